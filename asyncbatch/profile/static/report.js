// The script of the report's page (page.py), which puts timeline.js before it: unpack the spans, draw them, and let the
// page's buttons work on the picture. Until all of that is done, and where it fails, the page shows a still picture.
{
  const element = document.getElementById("timeline-data");
  if (element) {
    const { about, spans } = JSON.parse(element.textContent);
    const packed = Uint8Array.from(atob(spans), (character) => character.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    const columns = new Uint8Array(await new Response(stream).arrayBuffer()), count = columns.length / 24;
    const bytes = new Uint8Array(columns.length);
    for (let byte = 0; byte < 24; byte++) {
      for (let i = 0; i < count; i++) bytes[i * 24 + byte] = columns[byte * count + i];
    }
    const values = { about, spans: new DataView(bytes.buffer) }, view = document.getElementById("timeline-view");
    render({ model: { get: (name) => values[name] }, el: view });

    const canvas = view.querySelector("canvas");
    const show = (from, to) => canvas.dispatchEvent(new CustomEvent("show-time", { detail: [Number(from), Number(to)] }));
    for (const button of document.querySelectorAll("button[data-key]")) {
      button.onclick = () => canvas.dispatchEvent(new KeyboardEvent("keydown", { key: button.dataset.key }));
    }
    for (const button of document.querySelectorAll("button[data-from]")) {
      button.onclick = () => {
        show(button.dataset.from, button.dataset.to);
        if (button.closest("#timeline-view, .buttons")) return;
        canvas.focus({ preventScroll: true });
        view.scrollIntoView({ block: "center" });
      };
    }
    // timeline.js draws again when an attribute of the body changes.
    const dark = matchMedia("(prefers-color-scheme: dark)");
    dark.onchange = () => { document.body.dataset.theme = dark.matches ? "dark" : "light"; };
    document.documentElement.classList.add("live");
  }
}
