// Runs transformers.js's background-removal pipeline: node background_removal.mjs FOLDER PHOTO OUT DTYPE...
// Writes the alpha channel of the cut-out as raw bytes to OUT.DTYPE.
import { writeFileSync } from 'node:fs';
import { basename, dirname } from 'node:path';
import { env, pipeline } from '@huggingface/transformers';

const [folder, photo, out, ...dtypes] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);
for (const dtype of dtypes) {
  const remover = await pipeline('background-removal', basename(folder), { dtype, device: 'cpu' });
  const cutOut = await remover(photo);
  const pixels = cutOut.width * cutOut.height;
  writeFileSync(`${out}.${dtype}`, Uint8Array.from({ length: pixels }, (_, i) => cutOut.data[4 * i + 3]));
  await remover.dispose();
}
