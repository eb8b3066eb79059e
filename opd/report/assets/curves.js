// Curves: one chart per column, with all runs on one axis.
const ACCURACY = "held-out accuracy";

function columnLine(line, name) {
  const curve = line.part.curves[name];
  if (!curve) return null;
  const x = line.part.steps[curve[0]], y = curve[1], e = curve[2];
  const [least, most] = bounds(name, y.filter(known));
  const edge = (sign) => y.map((v, k) => known(v) && e && known(e[k]) ? Math.min(most, Math.max(least, v + sign * 1.96 * e[k])) : null);
  return { ...line, x, y, bold: smooth(y, Math.round(x.length / 40)), low: edge(-1), high: edge(1) };
}
function accuracyLine(line) {
  const rows = data.runs[line.run].evals.filter((row) => (row.task ?? "") === line.task);
  if (!rows.length) return null;
  const column = (name) => rows.map((row) => row[name]);
  return { ...line, x: column("step"), y: column("accuracy"), bold: column("accuracy"), low: column("low"), high: column("high") };
}
function smooth(y, width) {
  return y.map((value, i) => {
    if (!known(value)) return null;
    const near = y.slice(Math.max(0, i - width), i + width + 1).filter(known);
    return near.reduce((a, b) => a + b, 0) / near.length;
  });
}

let charts = [];
const linesOf = (name) => visibleLines().map((line) => name === ACCURACY ? accuracyLine(line) : columnLine(line, name)).filter(Boolean);
const titleOf = (name) => ABOUT.get(name)?.title ?? name;

// A question mark, and what it shows: what a column is and what healthy looks like.
function explained(name) {
  const about = ABOUT.get(name), rule = data.rules.find((rule) => rule.metric === name);
  const parts = [about?.meaning, (about || rule) && `Healthy: ${about?.healthy ?? rule.null}.`, rule && `Alarm ${words(rule.name)} watches it.`, name !== ACCURACY && `Column ${name}.`].filter(Boolean);
  const text = small(parts.join(" ")), mark = make("button", { type: "button", class: "mark", textContent: "?", title: parts.join(" "), "aria-label": `About ${titleOf(name)}`, "aria-expanded": "false", onclick: () => {
    text.hidden = !text.hidden;
    mark.setAttribute("aria-expanded", String(!text.hidden));
  } });
  text.hidden = true;
  return [mark, text];
}

// The box of a column; `drawn` adds the plot once the box has its width.
function chart(name) {
  const mine = linesOf(name), holder = make("div", { class: "chart" }), title = titleOf(name);
  holder.dataset.column = name;
  const [mark, text] = explained(name), save = () => download(`${name.replaceAll(/[^\w]+/g, "_")}.csv`, csvOf(mine));
  holder.append(make("h3", {}, make("span", {}, breakable(title)), make("span", { class: "tools" }, mark, " ",
    mine.length ? make("button", { type: "button", class: "link", textContent: "csv", title: "Download the points of this chart", "aria-label": `Download ${name} as CSV`, onclick: save }) : null,
    state.extra.includes(name) ? make("button", { type: "button", class: "link", textContent: "×", "aria-label": `Remove ${name}`, onclick: () => { state.extra = state.extra.filter((x) => x !== name); drawCharts(); } }) : null)));
  holder.append(text);
  if (!mine.length) { holder.append(small("not recorded in the runs shown")); return { holder }; }
  const body = make("div", { class: "plot", tabIndex: 0, role: "img", "aria-label": `${title}: ${mine.map((line) => `${line.label} from ${show(line.y.find(known))} to ${show(line.y.findLast(known))}`).join("; ")}. Use the arrow keys to read values.` });
  const readout = make("div", { class: "readout", "aria-live": "polite" });
  holder.append(body, readout);
  return { holder, name, mine, body, readout };
}
function drawn({ name, mine, body, readout }) {
  const table = uPlot.join(mine.map((line) => [line.x, line.y, line.bold, line.low, line.high]));
  const plot = new uPlot({ ...chartOptions(name, mine, readout), width: Math.max(160, body.clientWidth) }, table, body);
  if (state.zoom) plot.setScale("x", state.zoom);
  body.addEventListener("keydown", (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!way) return;
    event.preventDefault();
    const k = Math.min(plot.data[0].length - 1, Math.max(0, (plot.cursor.idx ?? -way) + way));
    plot.setCursor({ left: plot.valToPos(plot.data[0][k], "x"), top: 1 });
  });
  return { plot, body };
}

function chartOptions(name, mine, readout) {
  const series = [{}], bands = [];
  for (const line of mine) {
    const at = series.length, stroke = colour(line.i), few = line.x.length < 12, hidden = { stroke: "transparent", points: { show: false } };
    series.push({ stroke: faded(stroke, few ? 0 : 0.3), width: 1, points: { show: false } }, { stroke, width: 2, dash: dashed(line.i) ? [6, 4] : undefined, points: { show: few, size: 5, fill: stroke } }, hidden, hidden);
    if ($("bands").checked) bands.push({ series: [at + 3, at + 2], fill: faded(stroke, 0.14) });
  }
  const values = mine.flatMap((line) => line.y).filter(known), low = Math.min(...values), high = Math.max(...values);
  const log = low > 0 && high / low > 50;
  const axis = { stroke: css("--faint"), grid: { stroke: css("--line"), width: 1 }, font: "11px system-ui, sans-serif", ticks: { show: false } };
  const [least, most] = bounds(name, values), room = 0.02;
  const range = (_, a, b) => { const pad = (b - a || Math.abs(b) || 1) * 0.06; return [Math.max(least - room, a - pad), Math.min(most + room, b + pad)]; };
  return {
    height: 190, series, bands, legend: { show: false }, scales: { x: { time: false }, y: log ? { distr: 3 } : { range } },
    cursor: { drag: { x: true, y: false }, sync: { key: "step" }, points: { show: (u, i) => (i - 1) % 4 === 1 ? undefined : false } },
    axes: [{ ...axis, size: 20, gap: 2 }, { ...axis, size: 48, gap: 4, grid: log ? { ...axis.grid, filter: powers } : axis.grid, values: (_, ticks) => tickLabels(ticks) }],
    hooks: {
      setCursor: [(u) => readout.replaceChildren(...reading(u, mine))],
      setScale: [(u, key) => {
        if (key !== "x" || !u.data[0].length) return;
        const { min, max } = u.scales.x, all = u.data[0];
        state.zoom = min > all[0] || max < all[all.length - 1] ? { min, max } : null;
      }],
      draw: [(u) => marks(u, name, mine)],
    },
  };
}

const powers = (_, splits) => splits.map((v) => Math.abs(Math.log10(v) - Math.round(Math.log10(v))) < 1e-6 ? v : null);

function reading(u, mine) {
  const k = u.cursor.idx;
  if (!known(k)) return [];
  const parts = mine.map((line, j) => {
    const [y, , low, high] = [1, 2, 3, 4].map((m) => u.data[4 * j + m][k]);
    if (y === undefined) return null;
    const even = known(low) && Math.abs(high + low - 2 * y) <= 1e-3 * (high - low) && line.y !== line.bold;
    const value = y === null ? "not a number" : show(y) + (!known(low) ? "" : even ? ` ± ${show((high - low) / 2, 2)}` : ` [${show(low)}, ${show(high)}]`);
    return make("span", { class: "entry" }, swatch(line.i), value);
  });
  return [`step ${u.data[0][k]} `, ...parts.filter(Boolean)];
}

// Mark alarms by dashed lines at their steps, and non-finite values by ×.
function marks(u, name, mine) {
  const { ctx, bbox } = u, ratio = window.devicePixelRatio || 1;
  ctx.save();
  ctx.lineWidth = 1.5 * ratio;
  for (const line of mine) {
    ctx.strokeStyle = ctx.fillStyle = colour(line.i);
    for (const alarm of line.part.alarms.filter((alarm) => alarm.metric === name)) {
      const x = u.valToPos(alarm.step, "x", true);
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.setLineDash([4 * ratio, 3 * ratio]);
      ctx.beginPath(); ctx.moveTo(x, bbox.top + 8 * ratio); ctx.lineTo(x, bbox.top + bbox.height); ctx.stroke();
      ctx.setLineDash([]);
      ctx.beginPath(); ctx.moveTo(x - 4.5 * ratio, bbox.top); ctx.lineTo(x + 4.5 * ratio, bbox.top); ctx.lineTo(x, bbox.top + 8 * ratio); ctx.fill();
    }
    line.y.forEach((value, k) => {
      if (value !== null) return;
      const x = u.valToPos(line.x[k], "x", true), y = bbox.top + bbox.height - 6 * ratio, r = 3 * ratio;
      ctx.beginPath(); ctx.moveTo(x - r, y - r); ctx.lineTo(x + r, y + r); ctx.moveTo(x - r, y + r); ctx.lineTo(x + r, y - r); ctx.stroke();
    });
  }
  ctx.restore();
}

const columns = () => [...new Set(lines().flatMap((line) => Object.keys(line.part.curves)))].sort();
function drawCharts() {
  charts.forEach(({ plot }) => plot.destroy());
  const have = new Set(columns()), evaluated = data.runs.some((run) => run.evals.length > 0);
  const alarmed = lines().flatMap((line) => line.part.alarms.filter((alarm) => alarm.on).map((alarm) => alarm.metric));
  const usual = [...new Set([...PANELS.map(([name]) => name), ...alarmed])].filter((name) => have.has(name));
  const same = new Map(usual.filter((name) => !alarmed.includes(name)).map((name) => [name, constantValue(linesOf(name))]).filter(([, value]) => known(value)));
  state.extra = state.extra.filter((name) => !usual.includes(name) || same.has(name));
  drawConstants(same);
  const boxes = [...(evaluated ? [ACCURACY] : []), ...usual.filter((name) => !same.has(name)), ...state.extra].map(chart);
  $("charts").replaceChildren(...boxes.map((box) => box.holder));
  charts = boxes.filter((box) => box.body).map(drawn);
  if (!have.size) $("charts").append(small("No rows were recorded yet."));
  $("columns").replaceChildren(...[...have].map((value) => make("option", { value })));
}
function drawConstants(same) {
  const rows = [...same].map(([name, value]) => make("li", {}, `${titleOf(name)}: `, make("b", { textContent: show(value) }), " ", ...explained(name)));
  $("constants").hidden = !rows.length;
  $("constants").replaceChildren(make("summary", { class: "small", textContent: `${plural(rows.length, "quantity").replace("quantitys", "quantities")} the same at every step` }), make("ul", {}, rows));
}
function resize() {
  for (const { plot, body } of charts) {
    const width = Math.max(160, body.clientWidth);
    if (Math.abs(plot.width - width) > 1) plot.setSize({ width, height: 190 });
  }
}
function drawLegend() {
  const all = lines();
  $("legend").hidden = all.length < 2;
  $("legend").replaceChildren(...all.map((line) => make("button", { type: "button", class: "chip", "aria-pressed": String(!state.hidden.has(line.label)), onclick: () => {
    if (!state.hidden.delete(line.label)) state.hidden.add(line.label);
    drawLegend(); drawCharts(); drawPositions();
  } }, swatch(line.i), line.label)));
}
function showColumn(name) {
  if (!columns().includes(name)) return false;
  const find = () => [...document.querySelectorAll(".chart")].find((node) => node.dataset.column === name);
  if (!find()) { state.extra.push(name); drawCharts(); }
  const found = find();
  found?.scrollIntoView({ block: "center" });
  found?.querySelector(".plot")?.focus({ preventScroll: true });
  return true;
}
