"use strict";
(() => {
const $ = (id) => document.getElementById(id);
const make = (tag, props = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key === "class") node.className = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key in node && key !== "list") node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
};
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8C6D1F"];
const DARK = ["#56B4E9", "#F08C3C", "#4CC38A", "#E39BC4", "#F2BE4B", "#9AD0F5", "#A9B1B8", "#D3B45C"];
const PANELS = ["collapse/reward", "drift/reverse_kl", "drift/k1", "grad_norm", "drift/student_entropy",
  "collapse/length", "collapse/truncated_share", "supervision/signal_top1_share", "tokens/confident_impossible_share"];
const dark = () => document.documentElement.dataset.theme === "dark";
const show = (x, digits = 3) => x === null || x === undefined ? "–" : Number(x.toPrecision(digits)).toString();
const percent = (x) => x === null || x === undefined ? "–" : x > 0 && x < 1e-4 ? x.toExponential(0) : `${show(100 * x)} %`;

let data = JSON.parse($("data").textContent);
const state = { extra: [], hidden: new Set(), picked: 0, token: 0, run: 0 };

// --- verdicts --------------------------------------------------------------------------------
const finals = (run) => {
  const byTask = new Map();
  for (const row of run.evals) byTask.set(row.task || "", [...(byTask.get(row.task || "") || []), row]);
  return [...byTask];
};
function card(run) {
  const alarms = run.tasks.flatMap((part) => part.alarms.map((alarm) => ({ ...alarm, task: part.task })));
  const on = alarms.filter((alarm) => alarm.on);
  const done = run.done >= run.steps;
  const node = make("article", { class: on.length ? "card bad" : "card" }, make("h3", { textContent: run.name }));
  const verdict = on.length ? `${on.length} alarm${on.length > 1 ? "s" : ""} on` : alarms.length ? "no alarm is on; there were some" : "no alarm";
  node.append(make("p", {}, make("b", { textContent: verdict }), ` · step ${run.done} of ${run.steps}${done ? "" : ", unfinished"} · ${run.objective}, seed ${run.seed} · ${show(run.seconds / 60, 2)} min`));
  for (const [task, rows] of finals(run)) {
    const first = rows[0], last = rows[rows.length - 1];
    const line = `accuracy ${task ? `on ${task} ` : ""}${first.accuracy.toFixed(3)} → ${last.accuracy.toFixed(3)} [${last.low.toFixed(3)}, ${last.high.toFixed(3)}] on ${last.problems} held-out problems`;
    node.append(make("p", { class: "score", textContent: line }));
  }
  const list = make("ul");
  for (const alarm of [...on, ...alarms.filter((alarm) => !alarm.on)]) {
    const error = alarm.error ? ` ± ${show(alarm.error, 2)}` : "";
    list.append(make("li", { class: alarm.on ? "alarm" : "over" }, make("b", { textContent: `${alarm.rule.replaceAll("_", " ")}${alarm.task ? ` (${alarm.task})` : ""}, step ${alarm.step}${alarm.on ? "" : ", over"}: ` }),
      `${alarm.means}. `, make("span", { class: "small", textContent: `${alarm.tested} is ${show(alarm.value)}${error}; healthy ${alarm.range}. ` }), make("span", { textContent: `To do: ${alarm.remedy}.` })));
  }
  if (alarms.length) node.append(list);
  const part = run.tasks[0], silent = part.unwatched.length;
  const rules = `${part.rules - silent} of ${part.rules} rules watched${silent ? `; never recorded: ${part.unwatched.join(", ").replaceAll("_", " ")}` : ""}`;
  node.append(make("p", { class: "small", textContent: rules }));
  return node;
}

// --- curves ----------------------------------------------------------------------------------
const series = () => data.runs.flatMap((run, i) => run.tasks.map((part) => ({ run: i, task: part.task, curves: part.curves, alarms: part.alarms,
  label: data.runs.length > 1 || !part.task ? run.name + (part.task ? ` · ${part.task}` : "") : part.task })));
const colour = (i) => (dark() ? DARK : COLOURS)[i % COLOURS.length];
const faded = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, "0");
function smooth(y, width) {
  return y.map((value, i) => {
    const near = y.slice(Math.max(0, i - width), i + width + 1).filter((v) => v !== null && v !== undefined);
    return value === null || value === undefined || !near.length ? null : near.reduce((a, b) => a + b, 0) / near.length;
  });
}
let charts = [];
function chart(name, removable) {
  const all = series().map((s, i) => ({ ...s, i })).filter((s) => s.curves[name] && !state.hidden.has(s.i));
  const holder = make("div", { class: "chart" });
  const title = make("h3", {}, make("span", { textContent: name }));
  if (removable) title.append(make("button", { type: "button", textContent: "×", "aria-label": `Remove ${name}`, onclick: () => { state.extra = state.extra.filter((x) => x !== name); drawCharts(); } }));
  holder.append(title);
  if (!all.length) { holder.append(make("p", { class: "small", textContent: "not recorded" })); return holder; }
  const tables = all.map((s) => {
    const [x, y, e] = s.curves[name], width = Math.max(0, Math.round(x.length / 40));
    const known = y.map((v) => v === null ? null : v);
    return [x, known, smooth(known, width), known.map((v, k) => v === null || e[k] === null ? null : v - 1.96 * e[k]), known.map((v, k) => v === null || e[k] === null ? null : v + 1.96 * e[k])];
  });
  const joined = uPlot.join(tables);
  const lines = [{}], bands = [];
  all.forEach((s) => {
    const at = lines.length, stroke = colour(s.i), points = { show: s.curves[name][0].length < 3 };
    lines.push({ label: `${s.label}, step`, stroke: faded(stroke, 0.35), width: 1, spanGaps: true, points: { show: false } },
      { label: s.label, stroke, width: 2, spanGaps: true, points },
      { stroke: "transparent", spanGaps: true, points: { show: false } }, { stroke: "transparent", spanGaps: true, points: { show: false } });
    if ($("bands").checked) bands.push({ series: [at + 3, at + 2], fill: faded(stroke, 0.12) });
  });
  const values = all.flatMap((s) => s.curves[name][1]).filter((v) => v !== null);
  const low = Math.min(...values), high = Math.max(...values), log = low > 0 && high / low > 50;
  const axis = { stroke: getComputedStyle(document.documentElement).getPropertyValue("--faint"), grid: { stroke: getComputedStyle(document.documentElement).getPropertyValue("--line"), width: 1 }, font: "11px system-ui", ticks: { show: false } };
  const readout = make("div", { class: "readout" });
  const options = { width: 300, height: 190, series: lines, bands, cursor: { drag: { x: true, y: false }, sync: { key: "step" } },
    scales: { x: { time: false }, y: log ? { distr: 3 } : { range: (_, a, b) => { const pad = (b - a || Math.abs(b) || 1) * 0.06; return [a - pad, b + pad]; } } },
    axes: [{ ...axis, size: 26 }, { ...axis, size: 52, values: (_, ticks) => ticks.map((v) => v === null ? "" : show(v, 3)) }],
    hooks: { setCursor: [(u) => {
      const k = u.cursor.idx;
      readout.textContent = k === null || k === undefined ? "" : `step ${u.data[0][k]}: ` + all.map((s, j) => { const v = u.data[1 + 4 * j][k]; return v === undefined || v === null ? null : `${s.label} ${show(v)}`; }).filter(Boolean).join("; ");
    }], draw: [(u) => {
      for (const s of all) for (const alarm of s.alarms) {
        if (!alarm.tested.includes(name)) continue;
        const x = u.valToPos(alarm.step, "x", true);
        u.ctx.save(); u.ctx.strokeStyle = colour(s.i); u.ctx.setLineDash([3, 3]); u.ctx.lineWidth = 1; u.ctx.beginPath();
        u.ctx.moveTo(x, u.bbox.top); u.ctx.lineTo(x, u.bbox.top + u.bbox.height); u.ctx.stroke(); u.ctx.restore();
      }
    }] } };
  const body = make("div", { role: "img", "aria-label": `${name}: ${all.map((s) => `${s.label} from ${show(s.curves[name][1].find((v) => v !== null) ?? null)} to ${show(s.curves[name][1].findLast((v) => v !== null) ?? null)}`).join("; ")}` });
  holder.append(body, readout);
  charts.push({ plot: new uPlot(options, joined, body), body });
  return holder;
}
function drawCharts() {
  charts.forEach(({ plot }) => plot.destroy());
  charts = [];
  const known = new Set(series().flatMap((s) => Object.keys(s.curves)));
  const names = [...PANELS.filter((name) => known.has(name)), ...state.extra];
  $("charts").replaceChildren(...names.map((name) => chart(name, !PANELS.includes(name))));
  $("columns").replaceChildren(...[...known].sort().map((name) => make("option", { value: name })));
  $("legend").replaceChildren(...series().map((s, i) => make("button", { type: "button", "aria-pressed": String(!state.hidden.has(i)), onclick: () => { state.hidden.has(i) ? state.hidden.delete(i) : state.hidden.add(i); drawCharts(); } },
    (() => { const mark = make("span", { class: "swatch" }); mark.style.background = colour(i); return mark; })(), s.label)));
  resize();
}
const resize = () => charts.forEach(({ plot, body }) => { const width = Math.max(160, body.clientWidth); if (Math.abs(plot.width - width) > 1) plot.setSize({ width, height: 190 }); });

// --- positions -------------------------------------------------------------------------------
const VIRIDIS = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37]];
function shade(x) {
  const at = Math.min(VIRIDIS.length - 1.001, Math.max(0, x * (VIRIDIS.length - 1))), i = Math.floor(at), f = at - i;
  return VIRIDIS[i].map((v, k) => Math.round(v + f * (VIRIDIS[i + 1][k] - v)));
}
function heatMap(map) {
  const columns = map.steps.length, rows = map.bins.length, cell = 8;
  const canvas = make("canvas", { width: columns * cell, height: rows * cell, role: "img", "aria-label": `${map.title} by position and step` });
  const context = canvas.getContext("2d");
  const known = map.values.flat().filter((v) => v !== null), low = Math.min(...known), high = Math.max(...known);
  map.values.forEach((column, i) => column.forEach((value, j) => {
    const y = (rows - 1 - j) * cell, thin = map.tokens[i][j] !== null && map.tokens[i][j] < 30;
    if (value === null) return;
    context.fillStyle = `rgb(${shade(high > low ? (value - low) / (high - low) : 0.5)})`;
    context.fillRect(i * cell, y, cell, cell);
    if (thin) { context.strokeStyle = dark() ? "#000" : "#fff"; context.lineWidth = 1.4; context.beginPath(); context.moveTo(i * cell, y + cell); context.lineTo((i + 1) * cell, y); context.stroke(); }
  }));
  const readout = make("div", { class: "readout", textContent: `${show(low)} (dark) to ${show(high)} (light); steps ${map.steps[0]} to ${map.steps[columns - 1]} →, positions 0 to ${map.bins[rows - 1][1]} ↑` });
  canvas.addEventListener("mousemove", (event) => {
    const box = canvas.getBoundingClientRect();
    const i = Math.min(columns - 1, Math.floor((event.clientX - box.left) / box.width * columns)), j = rows - 1 - Math.min(rows - 1, Math.floor((event.clientY - box.top) / box.height * rows));
    readout.textContent = `step ${map.steps[i]}, positions ${map.bins[j].join("–")}: ${show(map.values[i][j])}${map.tokens[i][j] === null ? "" : `, ${map.tokens[i][j]} tokens`}`;
  });
  return make("div", { class: "map" }, make("h3", { textContent: map.title }), canvas, readout);
}
function anatomy(part) {
  if (!part.anatomy) return [];
  const colours = ["rgb(var(--down))", "rgb(var(--up))", "#CC79A7"];
  const nodes = [make("h3", { textContent: "Where the divergence sits: by position, first and last step" }),
    make("p", { class: "small" }, ...part.anatomy.names.flatMap((name, k) => { const mark = make("span", { class: "swatch" }); mark.style.background = colours[k]; return [mark, `${name}   `]; }))];
  const total = (row, j) => row.parts.reduce((sum, values) => sum + Math.max(0, values[j] ?? 0), 0);
  const most = Math.max(1e-12, ...part.anatomy.rows.flatMap((row) => row.bins.map((_, j) => total(row, j))));
  const table = make("table");
  for (const row of part.anatomy.rows) row.bins.forEach((bin, j) => {
    if (row.parts.every((values) => values[j] === null)) return;
    const bar = make("div", { class: "parts" });
    bar.style.width = "16rem";
    row.parts.forEach((values, k) => { const piece = make("i"); piece.style.background = colours[k]; piece.style.width = `${100 * Math.max(0, values[j] ?? 0) / most}%`; bar.append(piece); });
    table.append(make("tr", {}, make("td", { textContent: `step ${row.step}` }), make("td", { textContent: bin.join("–") }), make("td", {}, bar), make("td", { class: "n", textContent: show(row.parts.reduce((sum, values) => sum + (values[j] ?? 0), 0)) })));
  });
  return [...nodes, make("div", { class: "scroll" }, table)];
}
function drawPositions() {
  const all = series(), chosen = all[Math.min($("map-run").selectedIndex < 0 ? 0 : $("map-run").selectedIndex, all.length - 1)];
  const part = data.runs[chosen.run].tasks.find((part) => part.task === chosen.task);
  $("maps").replaceChildren(...(part.maps.length ? part.maps.map(heatMap) : [make("p", { class: "small", textContent: "no columns by position were recorded" })]));
  $("anatomy").replaceChildren(...anatomy(part));
}

// --- rollouts --------------------------------------------------------------------------------
const text = (run, id) => data.runs[run].texts[id] ?? `#${id}`;
const cost = (roll, k) => (roll.s[k] - roll.t[k]) / 100;
const worstFirst = (roll) => roll.ids.map((_, k) => k).sort((a, b) => Math.abs(cost(roll, b)) - Math.abs(cost(roll, a)));
const mean = (roll) => roll.ids.length ? roll.ids.reduce((sum, _, k) => sum + Math.abs(cost(roll, k)), 0) / roll.ids.length : 0;
function options(select, values, all) {
  const old = select.value;
  select.replaceChildren(...(all ? [make("option", { value: "", textContent: "all" })] : []), ...values.map(([value, label]) => make("option", { value, textContent: label })));
  if ([...select.options].some((option) => option.value === old)) select.value = old;
}
function filtered() {
  const run = state.run, outcome = $("f-outcome").value, step = $("f-step").value, task = $("f-task").value;
  const found = data.runs[run].rollouts.map((roll, i) => ({ roll, i })).filter(({ roll }) => (!step || String(roll.step) === step) && (!task || roll.task === task) &&
    (!outcome || (outcome === "cut" ? !roll.ended : roll.reward !== null && (outcome === "right") === (roll.reward >= 1))));
  const order = $("f-order").value;
  if (order === "worst") found.sort((a, b) => mean(b.roll) - mean(a.roll));
  if (order === "long") found.sort((a, b) => b.roll.ids.length - a.roll.ids.length);
  return found;
}
let shown = [], spans = [], worstAt = -1;
function drawFilters() {
  options($("f-run"), data.runs.map((run, i) => [String(i), run.name]), false);
  state.run = Math.max(0, $("f-run").selectedIndex);
  const rolls = data.runs[state.run].rollouts;
  options($("f-step"), [...new Set(rolls.map((roll) => roll.step))].map((step) => [String(step), String(step)]), true);
  const tasks = [...new Set(rolls.map((roll) => roll.task))].filter(Boolean);
  options($("f-task"), tasks.map((task) => [task, task]), true);
  $("l-task").hidden = !tasks.length;
  drawList();
}
function drawList(keep = false) {
  shown = filtered();
  if (!keep) state.picked = 0;
  state.picked = Math.min(state.picked, Math.max(0, shown.length - 1));
  $("list").replaceChildren(...(shown.length ? shown.map(({ roll }, place) => {
    const outcome = !roll.ended ? "cut" : roll.reward === null ? "" : roll.reward >= 1 ? "right" : "wrong";
    return make("div", { class: "row", role: "option", "aria-selected": String(place === state.picked), onclick: () => pick(place) },
      make("b", { textContent: `step ${roll.step}, #${roll.row}` }), ` ${outcome} `, make("span", { textContent: `${roll.task ? `${roll.task}, ` : ""}${roll.ids.length} tokens, mean |r| ${show(mean(roll))}` }));
  }) : [make("div", { class: "row", textContent: data.runs[state.run].rollouts.length ? "nothing fits the filters" : "the run saved no batches (--batch-every)" })]));
  drawRollout();
}
function pick(place) {
  if (!shown.length) return;
  state.picked = Math.min(shown.length - 1, Math.max(0, place));
  [...$("list").children].forEach((row, i) => row.setAttribute("aria-selected", String(i === state.picked)));
  $("list").children[state.picked]?.scrollIntoView({ block: "nearest" });
  drawRollout();
}
function drawRollout() {
  spans = []; worstAt = -1;
  const chosen = shown[state.picked];
  if (!chosen) { $("text").replaceChildren(); $("about").textContent = ""; $("detail").replaceChildren(); return; }
  const { roll } = chosen, special = new Set(data.runs[state.run].special), most = Math.max(1, ...(roll.e ?? [1]));
  const fragment = document.createDocumentFragment();
  roll.ids.forEach((id, k) => {
    if (roll.at && k && roll.at[k] > roll.at[k - 1] + 1) fragment.append(make("span", { class: "gap", textContent: ` ⟨${roll.at[k] - roll.at[k - 1] - 1} not supervised⟩ ` }));
    const r = cost(roll, k), shownText = text(state.run, id).replaceAll("␣", " ").replaceAll("⏎", "⏎\n").replaceAll("⇥", "⇥\t");
    const span = make("span", { class: `t${roll.in && roll.in[k] === "0" ? " out" : ""}${special.has(id) ? " special" : ""}`, textContent: shownText });
    span.dataset.k = k;
    span.style.setProperty("--c", r > 0 ? "var(--down)" : "var(--up)");
    span.style.setProperty("--a", Math.min(0.85, Math.sqrt(Math.abs(r) / 8)).toFixed(3));
    if (roll.e) span.style.setProperty("--e", (4 * Math.sqrt(roll.e[k] / most)).toFixed(1));
    spans.push(span);
    fragment.append(span);
  });
  $("text").replaceChildren(fragment);
  $("text").scrollTop = 0;
  const outcome = roll.reward === null ? "not graded" : `reward ${show(roll.reward)}`;
  $("about").textContent = `${data.runs[state.run].name} · step ${roll.step} · response ${roll.row} of prompt ${roll.prompt}${roll.task ? ` · ${roll.task}` : ""} · ${outcome} · ${roll.ended ? "ended" : "cut at the budget"}`;
  state.token = Math.min(state.token, spans.length - 1);
  detail(Math.max(0, state.token), false);
}
function detail(k, scroll = true) {
  const chosen = shown[state.picked];
  if (!chosen || !spans[k]) return;
  spans.forEach((span) => span.classList.remove("on"));
  spans[k].classList.add("on");
  state.token = k;
  if (scroll) spans[k].scrollIntoView({ block: "nearest" });
  const { roll } = chosen, id = roll.ids[k], r = cost(roll, k), position = roll.at ? roll.at[k] : k;
  const lines = [["token", make("code", { textContent: JSON.stringify(text(state.run, id)) })], ["id, position", `${id}, ${position}`],
    ["student", `${percent(Math.exp(roll.s[k] / 100))} (log ${show(roll.s[k] / 100)})`], ["teacher", `${percent(Math.exp(roll.t[k] / 100))} (log ${show(roll.t[k] / 100)})`],
    ["signal log q − log p", `${show(-r)} nats: ${r > 0 ? "pushed down" : r < 0 ? "pushed up" : "left alone"}`]];
  if (roll.rank) lines.push(["teacher's rank", String(roll.rank[k])]);
  if (roll.e) lines.push(["update |r| |1 − p|", show(roll.e[k] / 100)]);
  if (roll.in) lines.push(["in the support", roll.in[k] === "1" ? "yes" : "no"], ["student's mass on it", percent(roll.mass[k] / 100)]);
  const table = make("table", {}, ...lines.map(([name, value]) => make("tr", {}, make("td", { textContent: name }), make("td", {}, value))));
  const nodes = [table];
  if (roll.top) nodes.push(make("h3", { textContent: "The teacher's likeliest tokens" }), make("table", {}, make("tr", {}, make("th", { textContent: "token" }), make("th", { class: "n", textContent: "teacher" }), make("th", { class: "n", textContent: "student" })),
    ...roll.top[k].map((other, j) => make("tr", {}, make("td", {}, make("code", { textContent: JSON.stringify(text(state.run, other)) })), make("td", { class: "n", textContent: percent(Math.exp(roll.topT[k][j] / 100)) }), make("td", { class: "n", textContent: percent(Math.exp(roll.topS[k][j] / 100)) })))));
  $("detail").replaceChildren(...nodes);
}
function nextWorst() {
  const chosen = shown[state.picked];
  if (!chosen) return;
  worstAt = (worstAt + 1) % spans.length;
  detail(worstFirst(chosen.roll)[worstAt]);
}

// --- tables ----------------------------------------------------------------------------------
const tableOf = (heads, rows) => make("div", { class: "scroll" }, make("table", {}, make("tr", {}, ...heads.map(([name, numeric]) => make("th", { class: numeric ? "n" : "", textContent: name }))),
  ...rows.map((row) => make("tr", {}, ...row.map((cell, j) => make("td", { class: heads[j][1] ? "n" : "" }, cell))))));
const code = (value) => make("code", { textContent: value });
function drawTokens() {
  $("blame").replaceChildren(...data.runs.flatMap((run, i) => {
    if (!run.blame.length) return [make("p", { class: "small", textContent: `${run.name}: no saved batch` })];
    const name = (id) => code(JSON.stringify(text(i, id)) + (run.special.includes(id) ? "  special" : ""));
    const nodes = [make("h3", { textContent: `${run.name}: ids by their share of the signal, last saved batch` }),
      tableOf([["token"], ["id", 1], ["count", 1], ["of tokens", 1], ["of |signal|", 1], ["of energy", 1], ["mean cost", 1]], run.blame.slice(0, 20).map((row) => [name(row.id), String(row.id), String(row.count), percent(row.tokens), percent(row.signal), percent(row.energy), show(row.cost)])),
      make("h3", { textContent: `Tokens of which the student is sure and that the teacher holds impossible: ${percent(run.sheet.share)} of the tokens, ${percent(run.sheet.signal)} of |signal|` })];
    if (run.sheet.impossible.length) nodes.push(tableOf([["token"], ["id", 1], ["count", 1], ["student's log-prob", 1], ["teacher's", 1]], run.sheet.impossible.slice(0, 20).map((row) => [name(row.id), String(row.id), String(row.count), row.student.toFixed(2), row.teacher.toFixed(2)])));
    nodes.push(make("p", { class: "small", textContent: `${percent(run.sheet.ended)} of the responses ended by themselves.` }));
    return nodes;
  }));
}
function drawGains() {
  if (!data.gains.length) { $("gains").replaceChildren(); return; }
  const signed = (x) => (x >= 0 ? "+" : "−") + Math.abs(x).toFixed(3);
  $("gains").replaceChildren(make("h3", { textContent: "Held-out accuracy, before and after" }),
    tableOf([["objective"], ["runs", 1], ["problems", 1], ["before", 1], ["after", 1], ["gain [95 %]", 1]], data.gains.map((row) => [row.objective, String(row.seeds), String(row.problems), row.before.toFixed(3), row.after.toFixed(3), `${signed(row.gain)} [${signed(row.low)}, ${signed(row.high)}]`])),
    make("p", { class: "small", textContent: "Gains are paired by problem; intervals resample problems and runs." }));
}
function drawProvenance() {
  const nodes = [tableOf([["run"], ["folder"], ["student"], ["teacher"], ["code"]], data.runs.map((run) => [run.name, run.folder, run.student, run.teacher, code(run.code)]))];
  nodes.push(make("h3", { textContent: "Settings that differ" }), data.differences.length ? tableOf([["setting"], ...data.runs.map((run) => [run.name])], data.differences.map((row) => row.map((cell, j) => j ? code(cell) : cell))) : make("p", { class: "small", textContent: data.runs.length > 1 ? "none" : "one run" }));
  nodes.push(make("details", {}, make("summary", { textContent: `all settings of ${data.runs[0].name}` }), make("pre", { textContent: JSON.stringify(data.config, null, 1) })));
  $("provenance").replaceChildren(...nodes);
}

// --- the page --------------------------------------------------------------------------------
function drawAll(keep) {
  $("title").textContent = `On-policy distillation: ${data.runs.length > 1 ? `${data.runs.length} runs` : data.runs[0].name}`;
  $("made").textContent = `made ${data.made}`;
  $("cards").replaceChildren(...data.runs.map(card));
  drawGains();
  options($("map-run"), series().map((s, i) => [String(i), s.label]), false);
  drawCharts(); drawPositions();
  if (keep) { const scroll = $("text").scrollTop, list = $("list").scrollTop, token = state.token; options($("f-step"), [...new Set(data.runs[state.run].rollouts.map((roll) => roll.step))].map((step) => [String(step), String(step)]), true); drawList(true); $("text").scrollTop = scroll; $("list").scrollTop = list; detail(token, false); }
  else drawFilters();
  drawTokens(); drawProvenance();
}
function theme(value) { document.documentElement.dataset.theme = value; drawCharts(); drawPositions(); }
document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
$("theme").addEventListener("click", () => theme(dark() ? "light" : "dark"));
$("picker").addEventListener("submit", (event) => { event.preventDefault(); const name = $("column").value.trim(); if (name && !state.extra.includes(name) && !PANELS.includes(name)) state.extra.push(name); $("column").value = ""; drawCharts(); });
$("bands").addEventListener("change", drawCharts);
$("map-run").addEventListener("change", drawPositions);
$("f-run").addEventListener("change", drawFilters);
for (const id of ["f-step", "f-task", "f-outcome", "f-order"]) $(id).addEventListener("change", () => drawList());
$("prev").addEventListener("click", () => pick(state.picked - 1));
$("next").addEventListener("click", () => pick(state.picked + 1));
$("worst").addEventListener("click", nextWorst);
for (const kind of ["mouseover", "click"]) $("text").addEventListener(kind, (event) => { const span = event.target.closest(".t"); if (span) detail(Number(span.dataset.k), false); });
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName)) return;
  const reading = $("text").contains(event.target) || $("list").contains(event.target) || event.target === document.body;
  if (!reading) return;
  const act = { n: () => pick(state.picked + 1), p: () => pick(state.picked - 1), w: nextWorst, ArrowRight: () => detail(Math.min(spans.length - 1, state.token + 1)), ArrowLeft: () => detail(Math.max(0, state.token - 1)) }[event.key];
  const listing = $("list").contains(event.target) ? { ArrowDown: () => pick(state.picked + 1), ArrowUp: () => pick(state.picked - 1) }[event.key] : undefined;
  if (!act && !listing) return;
  if (event.target === document.body && event.key.startsWith("Arrow")) return;
  event.preventDefault();
  (act ?? listing)();
});
new ResizeObserver(resize).observe($("charts"));
drawAll(false);
if (document.documentElement.dataset.watch === "watch") {
  let known = null;
  const look = async () => {
    try {
      const now = await (await fetch("/version")).text();
      if (known !== null && now !== known) { data = await (await fetch("/data")).json(); drawAll(true); }
      known = now;
    } catch { $("made").textContent = `made ${data.made}; the server does not answer`; }
    setTimeout(look, 3000);
  };
  look();
}
})();
