"""ICC profiles for tests, since Pillow creates sRGB only."""

import struct


# Colorants of Display P3, adapted to the white point D50 of ICC profiles.
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407))


def matrix_profile(colorants=DISPLAY_P3, gamma=2.2):
    """A version 2 matrix profile (ICC.1:2001-04) with the XYZ of red, green and blue and one gamma."""

    def numbers(*values):
        return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))

    def xyz(values):
        return b"XYZ \0\0\0\0" + numbers(*values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    name = b"test\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + bytes(78 + 3)
    tags = {b"desc": description, b"cprt": b"text\0\0\0\0none\0\0\0\0", b"wtpt": xyz((0.9642, 1, 0.8249))}
    for letter, values in zip((b"r", b"g", b"b"), colorants, strict=True):
        tags[letter + b"XYZ"], tags[letter + b"TRC"] = xyz(values), curve
    table, data, offset = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for tag, content in tags.items():
        content += bytes(-len(content) % 4)
        table += tag + struct.pack(">II", offset + len(data), len(content))
        data += content
    size = 128 + len(table) + len(data)
    header = struct.pack(">I4sI4s4s4s12x4s", size, b"\0" * 4, 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    return header.ljust(68, b"\0") + numbers(0.9642, 1, 0.8249) + bytes(128 - 80) + table + data
