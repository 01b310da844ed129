// The interactive timeline of pictures/timelines.py: one canvas, drawn like the still picture, to zoom, drag, point at and
// read out. It fetches nothing. Spans come as bytes, 24 for each: start and end (float64, seconds), step (int32), name and
// layer (uint16). If spans are too small to draw one by one, each pixel column is filled up to the share of its time that
// was busy. A lane may have spans for only a part of the run ("kept", from when to when): the rest is drawn as left out.

const RIGHT = 10, ROW = 30, HEAD = 26, LINE = 15, PAUSE = 8, STRIP = 14, GAP = 26, FONT = "12px system-ui, sans-serif";
const NAME_FONT = "bold 14px system-ui, sans-serif";

// How many of the ascending `values` are <= t.
function upTo(values, t) {
  let low = 0, high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] <= t) low = middle + 1; else high = middle;
  }
  return low;
}

// The function t -> busy seconds before t, for spans in order of their starts; overlaps count once.
function busyCurve(starts, ends) {
  const from = [], to = [], before = [0];
  for (let i = 0; i < starts.length; i++) {
    const last = to.length - 1;
    if (last >= 0 && starts[i] <= to[last]) to[last] = Math.max(to[last], ends[i]);
    else { from.push(starts[i]); to.push(ends[i]); }
  }
  for (let i = 0; i < from.length; i++) before.push(before[i] + to[i] - from[i]);
  return (t) => { const k = upTo(from, t) - 1; return k < 0 ? 0 : before[k] + Math.min(t, to[k]) - from[k]; };
}

function unpack(view, about) {
  const layers = about.tracks.flatMap((_, track) => about.layers.map((layer) => (
    { ...layer, track, starts: [], ends: [], steps: [], names: [] })));
  for (let at = 0; at < view.byteLength; at += 24) {
    const layer = layers[view.getUint16(at + 22, true)];
    layer.starts.push(view.getFloat64(at, true));
    layer.ends.push(view.getFloat64(at + 8, true));
    layer.steps.push(view.getInt32(at + 16, true));
    layer.names.push(about.names[view.getUint16(at + 20, true)]);
  }
  for (const layer of layers) layer.busy = busyCurve(layer.starts, layer.ends);
  return layers;
}

// The steps of a track in order: their starts, their numbers, and until when the device was busy with those so far.
function stepsOf(layers) {
  const found = layers.flatMap((layer) => layer.starts.map((start, i) => [start, layer.ends[i], layer.steps[i]]));
  found.sort((one, two) => one[0] - two[0]);
  let last = -Infinity;
  return { starts: found.map((one) => one[0]), numbers: found.map((one) => one[2]),
    until: found.map((one) => (last = Math.max(last, one[1]))) };
}

// The gap around t, as [start, end, the step before which it is]; undefined if there is none.
function gapAt({ starts, numbers, until }, t) {
  const next = upTo(starts, t);
  if (next > 0 && next < starts.length && until[next - 1] < t) return [until[next - 1], starts[next], numbers[next]];
}

function seconds(value, digits = 4, scale = value || 2) {  // in the unit that suits `scale`
  const [factor, unit] = scale >= 2 ? [1, "s"] : scale >= 2e-3 ? [1e3, "ms"] : [1e6, "µs"];
  return `${Number((value * factor).toPrecision(digits))} ${unit}`;
}

function render({ model, el }) {
  const about = model.get("about"), layers = unpack(model.get("spans"), about), end = about.end;
  const HOST = about.lanes.findIndex(({ lane }) => lane === "host"), COMPUTE = about.lanes.findIndex(({ lane }) => lane === "compute");
  const lanes = about.tracks.flatMap((_, track) => about.lanes.map((lane, i) => (
    { ...lane, track, index: i, layers: layers.filter((layer) => layer.track === track && layer.lane === i) })));
  const [canvas, tip, live, help] = ["canvas", "div", "div", "div"].map((tag) => document.createElement(tag));
  const root = document.createElement("div"), ctx = canvas.getContext("2d");
  const steps = about.tracks.map((_, track) => stepsOf(layers.filter((layer) => layer.track === track && layer.lane === COMPUTE)));
  const causes = about.tracks.map(({ gaps }) => new Map(gaps.steps.map((step, i) => [step, [about.causes[gaps.causes[i]], gaps.percent[i]]])));
  let [from, to] = about.window, width = 800, height = 0, LEFT = 108, drag = null, pointer = null, queued = 0;
  let pen = ctx;  // what is drawn on: the canvas in view, or the one that keeps the picture of the whole run
  const kept = { canvas: document.createElement("canvas"), of: "" };

  root.style.cssText = "position:relative;color:var(--jp-content-font-color1,var(--vscode-foreground,CanvasText));" + `font:${FONT}`;
  canvas.style.cssText = "display:block;width:100%;outline-offset:-2px;touch-action:pan-y;cursor:grab";
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Timeline of ${about.tracks.map((t) => `${t.name}: ${t.caption}`).join("; ")}. ` +
    "Plus and minus zoom, arrow keys move, 0 goes back.");
  canvas.onfocus = () => { canvas.style.outline = "2px solid #0072B2"; };
  canvas.onblur = () => { canvas.style.outline = "none"; };
  tip.className = "asyncbatch-tip";
  tip.style.cssText = "position:absolute;display:none;pointer-events:none;padding:3px 7px;border-radius:3px;background:#222;color:#fff";
  live.className = "asyncbatch-live";
  live.setAttribute("aria-live", "polite");
  help.textContent = "Click the picture, then: wheel or + and - zoom, drag or arrow keys move, 0 goes back.";
  const others = { idle: about.idle, left: { face: "#8883", line: "#8886" } };
  // The fill of a layer, of "idle", or of what is left out, as a small canvas: its colour, with a hatch where a hatch
  // tells it from another.
  function tile(key) {
    const made = document.createElement("canvas"), pen = made.getContext("2d");
    const { face, line, hatch } = others[key] ?? about.layers.find((layer) => layer.key === key);
    made.width = made.height = 8;
    pen.fillStyle = face; pen.fillRect(0, 0, 8, 8);
    pen.strokeStyle = line; pen.lineWidth = 1.5;
    if (hatch === "|") { pen.moveTo(4, 0); pen.lineTo(4, 8); }
    else for (const x of [-8, 0, 8]) {
      pen.moveTo(x, 0); pen.lineTo(x + 8, 8);
      if (hatch === "x") { pen.moveTo(x, 8); pen.lineTo(x + 8, 0); }
    }
    if (line) pen.stroke();
    return made;
  }
  const fills = Object.fromEntries([...about.layers.map((layer) => layer.key), ...Object.keys(others)].map(
    (key) => [key, ctx.createPattern(tile(key), "repeat")]));

  const legend = document.createElement("div");
  const entries = [...about.layers.map((layer) => [layer.words, layer.key]), ["device idle", "idle"]];
  if (about.lanes.some((lane) => lane.kept)) entries.push(["left out of this page", "left"]);
  for (const [words, key] of entries) {
    const swatch = document.createElement("img"), item = document.createElement("span");
    swatch.src = tile(key).toDataURL(); swatch.alt = "";
    swatch.style.cssText = "width:16px;height:10px;margin-right:5px;object-fit:cover";
    item.style.cssText = "display:inline-block;margin:2px 14px 2px 0";
    item.append(swatch, words);
    legend.append(item);
  }
  root.append(canvas, tip, legend, live, help);
  el.append(root);

  // Fill lane layers between times a and b over [x, x + w] by the busy share of each pixel of the screen. Each layer is
  // one outline, there along its top and back along its base: a rectangle for each pixel takes the browser ten times as
  // long to paint.
  function columns(parts, a, b, x, y, w, h) {
    const n = Math.round(w * devicePixelRatio);
    let base = new Float64Array(n);
    for (const layer of parts) {
      const top = new Float64Array(n);
      for (let i = 0, low = layer.busy(a); i < n; i++) {
        const high = layer.busy(a + (b - a) * (i + 1) / n);
        top[i] = base[i] + (high - low) / (b - a) * n;
        low = high;
      }
      pen.fillStyle = fills[layer.key];
      pen.beginPath();
      for (let i = 0; i < n; i++) corner(top, i, i - 1, x + i * w / n, y, h);
      pen.lineTo(x + w, y + h * (1 - top[n - 1]));
      for (let i = n - 1; i >= 0; i--) corner(base, i, i + 1, x + (i + 1) * w / n, y, h);
      pen.lineTo(x, y + h * (1 - base[0]));
      pen.fill();
      base = top;
    }
  }

  function corner(level, i, before, x, y, h) {  // from the level of the pixel before to that of this one, at x
    if (level[i] === level[before]) return;
    if (before >= 0 && before < level.length) pen.lineTo(x, y + h * (1 - level[before]));
    pen.lineTo(x, y + h * (1 - level[i]));
  }

  function idleBand(parts, a, b, x, y, w, h) {
    const first = Math.min(...parts.map((p) => p.starts[0] ?? Infinity)), last = Math.max(...parts.map((p) => p.ends.at(-1) ?? -Infinity));
    const low = Math.max(a, first), high = Math.min(b, last);
    pen.fillStyle = fills.idle;
    if (low < high) pen.fillRect(x + (low - a) / (b - a) * w, y, (high - low) / (b - a) * w, h);
  }

  function leftOut(kept, until, a, b, x, y, w, h, words = "") {  // cover what of [a, b] is not kept, as far as `until`
    const parts = kept ? [[a, Math.min(b, kept[0], until)], [Math.max(a, kept[1]), Math.min(b, until)]] : [];
    for (const [start, stop] of parts) {
      const left = x + (start - a) / (b - a) * w, room = (stop - start) / (b - a) * w;
      if (room <= 0) continue;
      pen.fillStyle = fills.left; pen.fillRect(left, y, room, h);
      if (room > 60) write(words, left + room / 2, y + h / 2, getComputedStyle(root).color, "center");
    }
  }

  function spansOf(lane, a, b) {  // [layer, index] of the spans that touch [a, b]
    return lane.layers.flatMap((layer) => {
      const first = Math.max(0, upTo(layer.starts, a) - 1), last = upTo(layer.starts, b), found = [];
      for (let i = first; i < last && found.length < width; i++) if (layer.ends[i] > a) found.push([layer, i]);
      return found;
    }).reverse();  // waits first, so that work lies on top
  }

  // The name of a block from a to b: "plan 6" on the host's lane, upright where it is too narrow; "step 5" or "5" on the
  // compute lane, and there of what is a part of a step its own name.
  function label(lane, layer, i, a, b, y, h) {
    const step = layer.steps[i], name = layer.names[i], host = lane.index === HOST;
    ctx.font = FONT;
    const fits = (room) => (text) => ctx.measureText(text).width < room;
    const flat = (host ? [`${name} ${step}`] : name === "step" ? [`step ${step}`, `${step}`] : [name]).find(fits(b - a - 6));
    const text = flat ?? (host && b - a > 13 ? [`${name} ${step}`, name].find(fits(h - 2)) : undefined);
    if (!text) return;
    ctx.save();
    ctx.translate((a + b) / 2, y + h / 2);
    if (!flat) ctx.rotate(-Math.PI / 2);
    if (layer.line) {  // a quiet rim, to be read on a hatch
      Object.assign(ctx, { strokeStyle: layer.face, lineWidth: 3, textAlign: "center" });
      ctx.strokeText(text, 0, 0);
    }
    write(text, 0, 0, layer.text, "center");
    ctx.restore();
  }

  // Between steps drawn one by one: the word "idle" where it fits, a line where not even the hatch does.
  function gaps(found, toX, y, h, w) {
    const steps = found.map(([layer, i]) => [toX(layer.starts[i]), toX(layer.ends[i]), layer.steps[i]]);
    steps.sort((one, two) => one[0] - two[0]);
    for (let i = 1; i < steps.length; i++) {
      const a = steps[i - 1][1], b = steps[i][0];
      if (steps[i - 1][2] === steps[i][2]) continue;  // parts of one step
      if (b - a > 26) write("idle", (a + b) / 2, y + h / 2, "#8A3B00", "center", `bold ${FONT}`);
      else if (b - a < 5) { ctx.fillStyle = b - a <= 0.3 ? "#fff" : about.idle.line; ctx.fillRect(a, y, Math.max(0.5, b - a), h); }
    }
  }

  function write(text, x, y, fill, align = "left", font = FONT, room = undefined) {
    pen.font = font; pen.fillStyle = fill; pen.textAlign = align; pen.fillText(text, x, y, room);
  }

  // A track's caption as [what fits beside its name, the lines below it]: all of it beside, or all of it below.
  function captionOf(track) {
    const room = width - LEFT - RIGHT, fits = (text, used = 0) => ctx.measureText(text).width + used <= room;
    ctx.font = NAME_FONT;
    const used = ctx.measureText(track.name).width + 12;
    ctx.font = FONT;
    if (fits(track.caption, used)) return [track.caption, []];
    const lines = [""];
    for (const part of track.caption.split(", ")) {
      const longer = lines.at(-1) ? `${lines.at(-1)}, ${part}` : part;
      if (lines.at(-1) && !fits(longer)) lines.push(part); else lines[lines.length - 1] = longer;
    }
    return ["", lines];
  }

  function resize() {
    width = Math.max(180, canvas.clientWidth);
    LEFT = width < 520 ? 62 : 108;
    height = GAP + lanes.length * PAUSE + lanes.reduce((sum, lane) => sum + lane.height * ROW, 0) +
      about.tracks.reduce((sum, track) => sum + HEAD + STRIP + LINE * captionOf(track)[1].length, 0);
    canvas.style.height = `${height}px`;
    show(from, to);
  }

  // Begin to draw on a canvas of this size, in CSS pixels.
  function clean(target, w, h) {
    const [pixelsWide, pixelsHigh] = [w, h].map((length) => Math.floor(length * devicePixelRatio));
    pen = target.getContext("2d");
    if (target.width !== pixelsWide || target.height !== pixelsHigh) { target.width = pixelsWide; target.height = pixelsHigh; }
    pen.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    pen.clearRect(0, 0, w, h);
    pen.textBaseline = "middle";
  }

  // The whole run, which looks the same whatever part of it is shown below.
  function wholeRun(w, h, color) {
    const of = `${width} ${devicePixelRatio} ${color}`;
    if (kept.of === of) return;
    kept.of = of;
    clean(kept.canvas, width, h);
    about.tracks.forEach((track, i) => {
      const parts = lanes[i * about.lanes.length + COMPUTE].layers, y = i * STRIP + 2;
      ctx.font = FONT;
      const names = [`whole run, ${track.name}`, track.name, "whole run"], fits = (text) => ctx.measureText(text).width <= LEFT - 8;
      write(names.find(fits) ?? track.name, LEFT - 6, y + STRIP / 2, color, "right", FONT, LEFT - 8);
      idleBand(parts, 0, end, LEFT, y, w, STRIP - 3);
      columns(parts, 0, end, LEFT, y, w, STRIP - 3);
      leftOut(about.lanes[COMPUTE].kept, track.end, 0, end, LEFT, y, w, STRIP - 3);
    });
  }

  function draw() {
    queued = 0;
    const began = performance.now(), w = width - LEFT - RIGHT, color = getComputedStyle(root).color;
    const toX = (t) => LEFT + (t - from) / (to - from) * w, strip = STRIP * about.tracks.length;
    wholeRun(w, strip + 4, color);
    clean(canvas, width, height);
    ctx.drawImage(kept.canvas, 0, 0, width, strip + 4);  // and where in it we are:
    ctx.strokeStyle = color; ctx.lineWidth = 1.5;
    ctx.strokeRect(LEFT + from / end * w, 1, Math.max(2, (to - from) / end * w), strip);
    let y = strip + 6;
    for (const lane of lanes) {
      if (lane.index === HOST) {
        const track = about.tracks[lane.track];
        const [beside, below] = captionOf(track);
        y += HEAD;
        write(track.name, LEFT, y - 10, color, "left", NAME_FONT);
        if (beside) write(beside, LEFT + ctx.measureText(track.name).width + 12, y - 10, color);
        for (const line of below) { write(line, LEFT, y + LINE / 2 - 2, color); y += LINE; }
      }
      const h = lane.height * ROW, found = spansOf(lane, from, to), few = found.length <= w / 8;
      lane.y = y; lane.h = h;
      write(LEFT < 100 ? lane.words.split(" (")[0] : lane.words, LEFT - 6, y + h / 2, color, "right");
      ctx.fillStyle = color; ctx.globalAlpha = 0.3; ctx.fillRect(LEFT, y + h, w, 0.5); ctx.globalAlpha = 1;
      if (lane.index === COMPUTE) idleBand(lane.layers, from, to, LEFT, y, w, h);
      if (!few) columns(lane.layers, from, to, LEFT, y, w, h);
      else for (const [layer, i] of found) {
        const a = Math.max(LEFT, toX(layer.starts[i])), b = Math.min(LEFT + w, toX(layer.ends[i]));
        ctx.fillStyle = fills[layer.key];
        ctx.fillRect(a, y, Math.max(b - a, lane.index === COMPUTE ? 0 : 1), h);  // a short copy is never lost
        if (lane.index === HOST && b - a > 13) { pen.fillStyle = "#fff"; pen.fillRect(a, y, 0.8, h); }  // where a block begins
        if (lane.height > 0.6) label(lane, layer, i, a, b, y, h);
      }
      if (lane.index === COMPUTE && few) gaps(found, toX, y, h, w);
      leftOut(lane.kept, about.tracks[lane.track].end, from, to, LEFT, y, w, h, "left out");
      y += h + PAUSE;
    }
    const rough = (to - from) / Math.max(3, w / 110), power = 10 ** Math.floor(Math.log10(rough)), digits = Math.ceil(Math.log10(to / power)) + 1;
    const tick = power * [1, 2, 5, 10].find((m) => m * power >= rough);
    for (let k = Math.ceil(from / tick); k * tick <= to; k++) {
      ctx.fillStyle = color; ctx.fillRect(toX(k * tick), y - 4, 1, 5);
      write(seconds(k * tick, Math.max(1, digits), to), Math.min(toX(k * tick), width - 28), y + 9, color, "center");
    }
    const digitsShown = Math.max(4, digits), text = `Showing ${seconds(from, digitsShown, to)} to ${seconds(to, digitsShown)} of ${seconds(end)}.`;
    if (live.textContent !== text) live.textContent = text;
    canvas.dataset.view = `${from} ${to}`;
    canvas.dataset.drawMs = performance.now() - began;
    explain();
  }

  function show(a, b) {
    const long = Math.min(end, Math.max(b - a, 1e-6, end * 1e-9));
    from = Math.min(Math.max(0, a), end - long); to = from + long;
    queued ||= requestAnimationFrame(draw);
  }
  const zoom = (by, at = (from + to) / 2) => show(at - (at - from) * by, at + (to - at) * by);
  const timeAt = (x) => from + (x - LEFT) / (width - LEFT - RIGHT) * (to - from);

  // What is under the mouse, in words; "" for nothing.
  function wordsAt({ x, y }) {
    const t = timeAt(x), near = 3 * (to - from) / (width - LEFT - RIGHT);
    const lane = lanes.find((one) => y >= one.y && y <= one.y + one.h + PAUSE / 2);
    if (!lane || x < LEFT) return "";
    const where = `${about.tracks[lane.track].name}, ${lane.words}`, gap = lane.index === COMPUTE && gapAt(steps[lane.track], t);
    if (lane.kept && (t < lane.kept[0] || t > lane.kept[1])) return "left out of this page";
    if (gap) {
      const [cause, percent] = causes[lane.track].get(gap[2]) ?? [];
      const why = cause === undefined ? "" : `: ${cause} (${percent} % of it)`;
      return `${where}: idle for ${seconds(gap[1] - gap[0])} before step ${gap[2]}${why}`;
    }
    const off = ([layer, i]) => Math.max(layer.starts[i] - t, t - layer.ends[i], 0);
    const found = spansOf(lane, t - near, t + near);
    if (!found.length) return "";
    const [layer, i] = found.reduce((best, span) => (off(span) < off(best) ? span : best));
    return `${where}: ${layer.names[i]}, step ${layer.steps[i]}, ${seconds(layer.ends[i] - layer.starts[i])}, ` +
      `from ${seconds(layer.starts[i], 6)}`;
  }

  function explain() {  // after every move of the mouse, and of the picture under it
    const text = pointer && !drag ? wordsAt(pointer) : "";
    if (tip.textContent !== text) tip.textContent = text;
    tip.style.display = text ? "block" : "none";
    if (!text) return;
    tip.style.left = `${Math.min(pointer.x + 12, Math.max(0, width - tip.offsetWidth))}px`;
    tip.style.top = `${pointer.y + 16}px`;
  }

  canvas.addEventListener("wheel", (event) => {
    if (document.activeElement !== canvas && !event.ctrlKey) return;  // the page scrolls until the picture is clicked
    event.preventDefault();
    zoom(Math.exp(event.deltaY * 0.002), timeAt(event.offsetX));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    const move = (to - from) * 0.2;
    const action = { "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), "0": () => show(...about.window),
      ArrowLeft: () => show(from - move, to - move), ArrowRight: () => show(from + move, to + move) }[event.key];
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault(); event.stopPropagation();  // the notebook has shortcuts of its own
    action();
  });
  canvas.onpointerdown = (event) => {
    canvas.focus({ preventScroll: true }); canvas.setPointerCapture(event.pointerId);
    drag = { x: event.offsetX, from, to };
    explain();
  };
  canvas.onpointerup = canvas.onpointercancel = () => { drag = null; explain(); };
  canvas.onpointerleave = () => { pointer = null; explain(); };
  canvas.onpointermove = (event) => {
    pointer = { x: event.offsetX, y: event.offsetY };
    if (!drag) return explain();
    const scale = (to - from) / (width - LEFT - RIGHT), moved = (event.offsetX - drag.x) * scale;
    show(drag.from - moved, drag.to - moved);
  };

  canvas.addEventListener("show-time", (event) => show(...event.detail));  // for the page around it: [from, to]
  const resized = new ResizeObserver(resize);
  const themed = new MutationObserver(() => show(from, to));
  resized.observe(canvas);
  themed.observe(document.body, { attributes: true });
  return () => { resized.disconnect(); themed.disconnect(); cancelAnimationFrame(queued); };
}

export default { render };
