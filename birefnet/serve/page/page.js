"use strict";
// The viewer: the photo over its cut-out, with a line between them that a slider moves; zoom; pasted photos.
window.birefnet = (() => {
  let view = null;
  let zoom = "fit"; // or the number of screen pixels per pixel of the photo

  const find = (selector) => document.querySelector(`#viewer ${selector}`);

  // A picture takes the place of the former one only once it is loaded, so that nothing flickers.
  function load(image, source) {
    if (image.dataset.wanted === source) return;
    image.dataset.wanted = source;
    const loader = new Image();
    loader.onload = () => {
      if (image.dataset.wanted === source) image.src = source;
    };
    loader.src = source;
  }

  function layOut() {
    const [stage, frame] = [find(".stage"), find(".frame")];
    const fit = Math.min(1, (stage.clientWidth - 2) / view.width, (0.7 * window.innerHeight - 2) / view.height);
    const scale = zoom === "fit" ? fit : zoom / window.devicePixelRatio;
    frame.style.width = `${Math.max(1, view.width * scale)}px`;
    frame.style.height = `${Math.max(1, view.height * scale)}px`;
    frame.classList.toggle("large", zoom !== "fit" && zoom >= 2);
    const shown = Math.round(scale * window.devicePixelRatio * 100);
    find(".zoom").textContent = `${shown} %`;
    find('[data-zoom="fit"]').setAttribute("aria-pressed", String(zoom === "fit"));
    find('[data-zoom="pixels"]').setAttribute("aria-pressed", String(zoom === 1));
    // The preview is enough until it would be enlarged; then the result at the photo's own size is asked for.
    const full = zoom !== "fit" && Math.max(view.width, view.height) > 1280;
    load(find(".after"), `${view.address}/${full ? "full" : "after"}.webp?${view.version}`);
    load(find(".before"), `${view.address}/${full ? "full-before" : "before"}.webp?${view.address}`);
  }

  function setZoom(kind) {
    const [stage, frame] = [find(".stage"), find(".frame")];
    const current = (frame.clientWidth * window.devicePixelRatio) / view.width;
    const middle = [
      (stage.scrollLeft + stage.clientWidth / 2) / frame.clientWidth,
      (stage.scrollTop + stage.clientHeight / 2) / frame.clientHeight,
    ];
    zoom = { fit: "fit", pixels: 1, in: Math.min(16, current * 1.5), out: Math.max(0.05, current / 1.5) }[kind];
    layOut();
    stage.scrollLeft = middle[0] * frame.clientWidth - stage.clientWidth / 2;
    stage.scrollTop = middle[1] * frame.clientHeight - stage.clientHeight / 2;
  }

  function show(next) {
    find(".viewer").hidden = !next;
    if (!next) {
      view = null;
      return;
    }
    if (!view || view.address !== next.address) zoom = "fit";
    view = next;
    find(".after").alt = `Cut-out of ${view.name}`;
    find(".before").alt = `Photo ${view.name}`;
    find(".caption").textContent = `${view.name}, ${view.width} × ${view.height} pixels`;
    find(".download").href = `${view.address}/result.png`;
    find(".archive").hidden = !view.archive;
    if (view.archive) find(".archive").href = view.archive;
    layOut();
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("#viewer [data-zoom]");
    if (button && view) setZoom(button.dataset.zoom);
  });
  document.addEventListener("input", (event) => {
    if (event.target.matches("#viewer .split input")) {
      find(".frame").style.setProperty("--split", `${event.target.value}%`);
    }
  });
  window.addEventListener("resize", () => view && layOut());
  // Pasted photos go where chosen ones go.
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])].filter((file) => file.type.startsWith("image/"));
    const input = document.querySelector('#photos input[type="file"]');
    if (!files.length || !input) return;
    event.preventDefault();
    const transfer = new DataTransfer();
    files.forEach((file) => transfer.items.add(file));
    input.files = transfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });
  // Gradio gives its drop zones a name that differs from the words in them, which speech control needs.
  new MutationObserver(() => {
    document.querySelectorAll(".upload-container[aria-label]").forEach((zone) => zone.removeAttribute("aria-label"));
  }).observe(document.documentElement, { childList: true, subtree: true });
  return { show };
})();
