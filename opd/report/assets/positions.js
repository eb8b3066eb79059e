// Positions: heat maps of position by step on one scale for all runs, and the parts of the divergence.
const USUAL = ["divergence/reverse_kl", "divergence/outside_topk_expected", "divergence/teacher_entropy", "divergence/student_entropy", "divergence/k1", "divergence/teacher_max"];
const MAP_TITLES = new Map([["divergence/reverse_kl", "Reverse KL, nats"], ["divergence/outside_topk_expected", "Student's probability outside the top-K"], ["divergence/teacher_entropy", "Teacher's entropy, nats"],
  ["divergence/student_entropy", "Student's entropy, nats"], ["divergence/k1", "Reverse KL, sampled (k1), nats"], ["divergence/teacher_max", "Teacher's largest probability"]]);
const VIRIDIS = ["#440154", "#472c7a", "#3b518b", "#2c718e", "#21908d", "#27ad81", "#5cc863", "#aadc32", "#fde725"];
const SIGNED = ["#2166ac", "#6aaed6", "#d1e5f0", "#f7f7f7", "#fddbc7", "#ee9a5e", "#b35806"];
const FEW = 30, EDGE = { left: 46, bottom: 18, top: 3, right: 4 }, TALL = 150;

function shade(stops, x) {
  const at = Math.min(stops.length - 1.0001, Math.max(0, x * (stops.length - 1))), i = Math.floor(at), f = at - i;
  const channel = (hex, k) => parseInt(hex.slice(1 + 2 * k, 3 + 2 * k), 16);
  return `rgb(${[0, 1, 2].map((k) => Math.round(channel(stops[i], k) * (1 - f) + channel(stops[i + 1], k) * f))})`;
}

// One scale per column for all the runs shown; white is 0 where there are negative values.
function scaleOf(name, shown) {
  const values = shown.flatMap((line) => line.part.maps[name].values.flat()).filter(known);
  const low = Math.min(...values), high = Math.max(...values);
  if (low < -0.05 * Math.abs(high) && high > 0) { const most = Math.max(-low, high); return { low: -most, high: most, stops: SIGNED }; }
  const middle = [...values].sort((a, b) => a - b)[values.length >> 1];
  if (high > 30 * middle && low >= 0) { // one large bin would hide the others: logarithmic colours over three decades
    const least = Math.max(low, high / 1000);
    return { low: least, high, stops: VIRIDIS, at: (x) => Math.log(Math.max(x, least) / least) / Math.log(high / least), log: true };
  }
  return { low, high: high > low ? high : low + 1, stops: VIRIDIS };
}
const place = (scale, x) => scale.at ? scale.at(x) : (x - scale.low) / (scale.high - scale.low);

function heatMap(line, name, scale) {
  const map = line.part.maps[name], canvas = make("canvas", { tabIndex: 0, role: "img", "aria-label": `${name} of ${line.label} by position and step, from ${show(scale.low)} to ${show(scale.high)}. Use the arrow keys to read cells.` });
  const readout = make("div", { class: "readout", "aria-live": "polite" });
  const columns = map.steps.length, rows = map.bins.length;
  let at = null;
  const draw = () => {
    const width = Math.max(140, canvas.clientWidth), c = sharpen(canvas, width, TALL);
    const w = (width - EDGE.left - EDGE.right) / columns, h = (TALL - EDGE.top - EDGE.bottom) / rows;
    map.values.forEach((column, i) => column.forEach((value, j) => {
      if (!known(value)) return;
      const x = EDGE.left + i * w, y = EDGE.top + (rows - 1 - j) * h, tokens = map.tokens?.[i][j];
      c.fillStyle = shade(scale.stops, place(scale, value));
      c.fillRect(x, y, Math.ceil(w + 0.3), Math.ceil(h + 0.3));
      if (known(tokens) && tokens < FEW) hatch(c, x, y, w, h);
    }));
    c.fillStyle = css("--faint"); c.font = "10px system-ui, sans-serif"; c.textBaseline = "middle"; c.textAlign = "right";
    map.bins.forEach((bin, j) => { if (h >= 11 || (rows - 1 - j) % 2 === 0) c.fillText(bin[0] === bin[1] ? bin[0] : bin.join("–"), EDGE.left - 4, EDGE.top + (rows - 0.5 - j) * h); });
    c.textBaseline = "alphabetic";
    const ticks = Math.min(columns, width > 260 ? 5 : 3);
    for (let k = 0; k < ticks; k += 1) {
      const i = ticks === 1 ? 0 : Math.round(k * (columns - 1) / (ticks - 1));
      c.textAlign = k === 0 ? "left" : k === ticks - 1 ? "right" : "center";
      c.fillText(k === 0 ? `step ${map.steps[i]}` : map.steps[i], EDGE.left + (k === 0 ? 0 : k === ticks - 1 ? columns : i + 0.5) * w, TALL - 5);
    }
    if (at) { c.strokeStyle = css("--ink"); c.lineWidth = 1.5; c.strokeRect(EDGE.left + at[0] * w, EDGE.top + (rows - 1 - at[1]) * h, w, h); }
  };
  const read = (i, j) => {
    at = [Math.min(columns - 1, Math.max(0, i)), Math.min(rows - 1, Math.max(0, j))];
    const tokens = map.tokens?.[at[0]][at[1]];
    readout.textContent = `step ${map.steps[at[0]]}, positions ${map.bins[at[1]].join("–")}: ${show(map.values[at[0]][at[1]])}${known(tokens) ? ` over ${tokens} tokens` : ""}`;
    draw();
  };
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    read(Math.floor((event.clientX - box.left - EDGE.left) / (box.width - EDGE.left - EDGE.right) * columns), rows - 1 - Math.floor((event.clientY - box.top - EDGE.top) / (TALL - EDGE.top - EDGE.bottom) * rows));
  });
  canvas.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (way) { event.preventDefault(); read(...(at ? [at[0] + way[0], at[1] + way[1]] : [0, 0])); }
  });
  return { draw, node: make("div", { class: "map" }, data.runs.length > 1 || line.task ? make("h3", {}, swatch(line.i), line.label) : null, canvas, readout) };
}
function hatch(c, x, y, w, h) {
  c.save();
  c.beginPath(); c.rect(x, y, w, h); c.clip();
  c.strokeStyle = "rgb(255 255 255 / .75)"; c.lineWidth = 1;
  c.beginPath();
  for (let d = -Math.ceil(h / 5) * 5; d < w; d += 5) { c.moveTo(x + d, y + h); c.lineTo(x + d + h, y); }
  c.stroke();
  c.restore();
}
function scaleBar(scale) {
  const canvas = make("canvas", { class: "scale", "aria-hidden": "true" }), c = sharpen(canvas, 80, 9);
  for (let x = 0; x < 80; x += 1) { c.fillStyle = shade(scale.stops, x / 79); c.fillRect(x, 0, 1, 9); }
  return make("span", { class: "small scale-bar" }, `${scale.log ? "log, ≤ " : ""}${show(scale.low)} `, canvas, ` ${show(scale.high)}`);
}

let heat = [];
function drawPositions() {
  const shown = visibleLines(), names = [...new Set(shown.flatMap((line) => Object.keys(line.part.maps)))].sort();
  options($("map"), [["", shown.length > 1 ? "default (three)" : "default (six)"], ...names.map((name) => [name, MAP_TITLES.get(name) ?? name])]);
  const usual = USUAL.filter((name) => names.includes(name)).slice(0, shown.length > 1 ? 3 : 6), chosen = $("map").value ? [$("map").value] : usual.length ? usual : names.slice(0, 3);
  heat = [];
  $("maps").replaceChildren(...chosen.map((name) => {
    const mine = shown.filter((line) => line.part.maps[name]), scale = scaleOf(name, mine);
    const made = mine.map((line) => heatMap(line, name, scale));
    heat.push(...made);
    return make("div", { class: mine.length > 1 ? "quantity wide" : "quantity" }, make("h3", {}, make("span", { textContent: MAP_TITLES.get(name) ?? name }), scaleBar(scale)), make("div", { class: "row-of-maps" }, made.map((one) => one.node)));
  }));
  if (!chosen.length) $("maps").replaceChildren(small("No columns by position were recorded."));
  $("anatomy").replaceChildren(...shown.map(anatomy).filter(Boolean));
  $("h-anatomy").hidden = !$("anatomy").childElementCount;
  redrawMaps();
}
const redrawMaps = () => heat.forEach((map) => map.draw());

const PARTS = [["mass inside or outside the support", 1], ["within the support", 0], ["outside the support", 3]];
function anatomy(line) {
  const found = line.part.anatomy;
  if (!found) return null;
  const total = (values) => values.reduce((sum, x) => sum + Math.max(0, x ?? 0), 0);
  const at = (row, j) => row.parts.map((values) => values[j]);
  const most = Math.max(1e-12, ...found.rows.flatMap((row) => found.bins.map((_, j) => total(at(row, j)))));
  const grid = make("div", { class: "anatomy" }, make("span"), found.rows.map((row) => make("b", { class: "small", textContent: `step ${row.step}` })));
  grid.style.gridTemplateColumns = `4.2rem repeat(${found.rows.length}, minmax(0, 1fr))`;
  found.bins.forEach((bin, j) => {
    if (found.rows.every((row) => at(row, j).every((x) => !known(x)))) return;
    grid.append(make("span", { class: "small", textContent: bin.join("–") }));
    for (const row of found.rows) {
      const values = at(row, j), bar = make("span", { class: "parts" });
      values.forEach((x, k) => { const piece = make("i", { colour: colour(PARTS[k][1]), title: `${PARTS[k][0]}: ${show(x)} nats` }); piece.style.width = `${80 * Math.max(0, x ?? 0) / most}%`; bar.append(piece); });
      bar.append(make("span", { class: "small", textContent: ` ${show(values.reduce((sum, x) => sum + (x ?? 0), 0))}` }));
      grid.append(bar);
    }
  });
  return make("div", { class: "panel" }, make("h3", { textContent: line.label }),
    stacked(line.part),
    make("p", { class: "small" }, PARTS.map(([name, k]) => make("span", { class: "entry" }, swatch(k), name))), grid);
}

// Stacked parts over the steps; negative estimates are drawn as 0.
function stacked(part) {
  const curves = ["divergence/kl_binary", "divergence/kl_head", "divergence/kl_tail"].map((name) => part.curves[name]);
  if (curves.some((curve) => !curve)) return null;
  const steps = curves.map((curve) => part.steps[curve[0]]), at = curves.map((curve, k) => new Map(steps[k].map((step, i) => [step, Math.max(0, curve[1][i] ?? 0)])));
  const x = steps[0].filter((step) => at.every((values) => values.has(step))), sums = x.map((step) => at.reduce((all, values) => [...all, all[all.length - 1] + values.get(step)], [0]));
  if (x.length < 3) return null;
  const most = Math.max(...sums.map((sum) => sum[3]), 1e-12), canvas = make("canvas", { class: "stacked", role: "img", "aria-label": `Parts of the divergence from step ${x[0]} to ${x[x.length - 1]}, at most ${show(most)} nats per token` });
  heat.push({ draw: () => {
    const width = Math.max(140, canvas.clientWidth), c = sharpen(canvas, width, 96), across = (i) => 34 + (x[i] - x[0]) / (x[x.length - 1] - x[0]) * (width - 38), up = (v) => 80 - v / most * 74;
    for (const k of [2, 1, 0]) {
      c.fillStyle = colour(PARTS[k][1]);
      c.beginPath(); c.moveTo(across(0), up(0));
      sums.forEach((sum, i) => c.lineTo(across(i), up(sum[k + 1])));
      c.lineTo(across(x.length - 1), up(0)); c.fill();
    }
    c.fillStyle = css("--faint"); c.font = "10px system-ui, sans-serif"; c.textAlign = "right";
    c.fillText(show(most), 30, 12); c.fillText("0", 30, 82); c.fillText(x[x.length - 1], width - 4, 93);
    c.textAlign = "left"; c.fillText(`step ${x[0]}`, 34, 93);
  } });
  return canvas;
}
