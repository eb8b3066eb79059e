// Rollout viewer: colour is the signal, the bar below a token its root energy.
const FULL = 8; // nats at which the colour saturates

const textOf = (run, id) => data.runs[run].texts[id] ?? `#${id}`;
const spelled = (roll, k) => roll.odd[k] ?? textOf(state.run, roll.ids[k]);
const quoted = (text) => `"${text.replaceAll("\n", "\\n").replaceAll("\t", "\\t")}"`;
const cost = (roll, k) => (roll.s[k] - roll.t[k]) / 100;
const keyOf = (roll) => `${roll.step}/${roll.row}`;
const probability = (hundredths) => Math.exp(hundredths / 100);
const outside = (roll, k) => known(roll.in) && roll.in[k] === "0";

// Cached per rollout: supervised positions, mean |r|, positions by decreasing |r|.
const facts = new WeakMap();
function about(roll) {
  if (!facts.has(roll)) {
    const off = new Set(roll.off), places = roll.ids.map((_, k) => k).filter((k) => !off.has(k));
    const size = (k) => Math.abs(cost(roll, k));
    facts.set(roll, { off, places, mean: places.reduce((sum, k) => sum + size(k), 0) / Math.max(1, places.length), worst: [...places].sort((a, b) => size(b) - size(a)) });
  }
  return facts.get(roll);
}
const outcomeOf = (roll) => !roll.ended ? "truncated" : !known(roll.reward) ? "" : roll.reward >= 1 ? "right" : "wrong";

let shown = [], spans = [], lit = null, worstAt = -1;

function drawFilters() {
  options($("f-run"), data.runs.map((run, i) => [String(i), run.name]));
  state.run = Math.max(0, $("f-run").selectedIndex);
  const run = data.runs[state.run], tasks = [...new Set(run.rollouts.map((roll) => roll.task))].filter(Boolean);
  options($("f-step"), [["", "all"], ...run.saved.map(({ step }) => [String(step), String(step)])]);
  options($("f-task"), [["", "all"], ...tasks.map((task) => [task, task])]);
  $("l-run").hidden = data.runs.length < 2;
  $("l-task").hidden = !tasks.length;
  $("rollouts-hint").textContent = run.saved.length ? `${plural(run.rollouts.length, "response")} of the ${run.saved.reduce((sum, x) => sum + x.responses, 0)} in ${plural(run.saved.length, "saved batch").replace("batchs", "batches")}: from each batch, those with the largest |log q − log p| and equally many others.` : "";
  drawList();
}

function filtered() {
  const outcome = $("f-outcome").value, step = $("f-step").value, task = $("f-task").value, order = $("f-order").value;
  const found = data.runs[state.run].rollouts.filter((roll) => (!step || String(roll.step) === step) && (!task || roll.task === task) && (!outcome || outcomeOf(roll) === outcome));
  if (order === "worst") found.sort((a, b) => about(b).mean - about(a).mean);
  if (order === "long") found.sort((a, b) => b.ids.length - a.ids.length);
  return found;
}

function drawList() {
  shown = filtered();
  if (!shown.some((roll) => keyOf(roll) === state.key)) { state.key = shown.length ? keyOf(shown[0]) : ""; state.token = -1; }
  const none = data.runs[state.run].rollouts.length ? "No rollout matches the filters." : "The run saved no batches; train with --save-batch-every, or save dumps with diagnostics.records.token_dumps in its folder dumps/.";
  $("list").replaceChildren(...(shown.length ? shown.map(listed) : [small(none)]));
  showInList($("list").children[picked()]);
  drawRollout();
}
// Scrolls the list alone: scrollIntoView also scrolls the page, which would open in its middle.
function showInList(row) {
  if (!row) return;
  const list = $("list"), box = list.getBoundingClientRect(), at = row.getBoundingClientRect();
  list.scrollTop += Math.min(0, at.top - box.top) || Math.max(0, at.bottom - box.bottom);
}
const picked = () => shown.findIndex((roll) => keyOf(roll) === state.key);
function listed(roll, place) {
  const outcome = outcomeOf(roll), chosen = keyOf(roll) === state.key, most = Math.max(...shown.map((one) => about(one).mean), 1e-9);
  const bar = make("i", { class: "meter" });
  bar.style.width = `${100 * about(roll).mean / most}%`;
  return make("div", { class: "row", role: "option", id: `roll-${place}`, "aria-selected": String(chosen), onclick: () => pick(place) },
    make("span", {}, make("b", { textContent: `step ${roll.step}` }), ` #${roll.row}`, roll.turn ? ` turn ${roll.turn}` : "", roll.task ? ` ${roll.task}` : ""), make("span", { class: `tag ${outcome}`, textContent: outcome }),
    make("span", { class: "small", textContent: `${roll.ids.length} tokens · mean |log q − log p| ${show(about(roll).mean)}` }), bar);
}
function pick(place) {
  if (!shown.length) return;
  const at = Math.min(shown.length - 1, Math.max(0, place));
  state.key = keyOf(shown[at]);
  state.token = -1;
  [...$("list").children].forEach((row, i) => row.setAttribute("aria-selected", String(i === at)));
  showInList($("list").children[at]);
  $("text").scrollTop = 0;
  drawRollout();
}

function drawRollout() {
  spans = []; lit = null; worstAt = -1;
  const roll = shown[picked()];
  $("list").setAttribute("aria-activedescendant", roll ? `roll-${picked()}` : "");
  $("reading").hidden = !roll;
  $("detail").hidden = !roll;
  if (!roll) return;
  const special = new Set(data.runs[state.run].special), { off, places } = about(roll);
  const most = Math.max(1e-9, ...places.map((k) => roll.e?.[k] ?? 0)), fragment = document.createDocumentFragment();
  roll.ids.forEach((id, k) => {
    const span = make("span", { class: "t", id: `t-${k}`, role: "option", textContent: glyphs(spelled(roll, k)) });
    span.dataset.k = k;
    if (special.has(id)) span.classList.add("special");
    if (off.has(k)) span.classList.add("off");
    else {
      const r = cost(roll, k);
      if (outside(roll, k)) span.classList.add("out");
      span.style.setProperty("--c", r > 0 ? "var(--down)" : "var(--up)");
      span.style.setProperty("--a", Math.min(1, Math.sqrt(Math.abs(r) / FULL)).toFixed(3));
      if (roll.e) span.style.setProperty("--e", (5 * Math.sqrt(roll.e[k] / most)).toFixed(1));
    }
    spans.push(span);
    fragment.append(span);
  });
  $("text").replaceChildren(fragment);
  $("asked").textContent = roll.asked ?? "";
  $("asking").hidden = !roll.asked;
  $("view").textContent = roll.view ?? "";
  $("viewing").hidden = !roll.view;
  drawStrip(roll);
  const graded = known(roll.reward) ? `reward ${show(roll.reward)}` : "not graded";
  $("about").textContent = [data.runs.length > 1 && data.runs[state.run].name, `step ${roll.step}`, `response ${roll.row} to prompt ${roll.prompt}`, roll.turn > 0 && `turn ${roll.turn}`, roll.task, graded, roll.ended ? "ended with EOS" : "truncated",
    roll.in && `${percent(places.filter((k) => outside(roll, k)).length / Math.max(1, places.length))} outside the support`].filter(Boolean).join(" · ");
  focusToken(state.token >= 0 && state.token < spans.length ? state.token : about(roll).worst[0] ?? 0, false);
}
// Make white space visible: marks for line ends, tabs and lone spaces; dots for later bytes of a character.
function glyphs(text) {
  if (text === "") return "‥";
  if (/^ +$/.test(text)) return "␣".repeat(text.length);
  return text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t");
}

function focusToken(k, scroll = true) {
  const roll = shown[picked()];
  if (!roll || !spans[k]) return;
  lit?.classList.remove("on");
  lit = spans[k];
  lit.classList.add("on");
  state.token = k;
  $("text").setAttribute("aria-activedescendant", lit.id);
  if (scroll) {
    const box = $("text").getBoundingClientRect(), at = lit.getBoundingClientRect();
    if (at.top < box.top + 8 || at.bottom > box.bottom - 8) $("text").scrollTop += at.top - box.top - box.height / 2;
  }
  moveNeedle();
  drawDetail(roll, k);
}

// Bars of the signal of the whole response on a square-root scale: below the axis pushed down, above it pushed up.
const barWidth = () => Math.min(14, Math.max(120, $("strip").clientWidth) / spans.length);
function drawStrip(roll) {
  const canvas = $("strip"), width = Math.max(120, canvas.clientWidth), height = 56, c = sharpen(canvas, width, height), w = barWidth();
  const { places, worst } = about(roll), most = Math.sqrt(Math.max(1, Math.abs(cost(roll, worst[0] ?? 0)))), middle = height / 2;
  c.fillStyle = css("--line"); c.fillRect(0, middle - 0.5, w * spans.length, 1);
  for (const k of places) {
    const r = cost(roll, k), h = Math.max(0.5, Math.sqrt(Math.abs(r)) / most * (middle - 3));
    c.fillStyle = `rgb(${css(r > 0 ? "--down" : "--up")})`;
    c.fillRect(k * w, r > 0 ? middle : middle - h, Math.max(0.6, w - (w > 3 ? 1 : 0)), h);
  }
  moveNeedle();
}
function moveNeedle() {
  $("needle").style.width = `${Math.max(3, barWidth() + 1)}px`;
  $("needle").style.transform = `translateX(${Math.max(0, state.token) * barWidth() - 1}px)`;
}

function drawDetail(roll, k) {
  const id = roll.ids[k], off = about(roll).off.has(k), r = cost(roll, k), special = data.runs[state.run].special.includes(id);
  const head = make("div", { class: "token-head" }, make("code", { class: "big", textContent: quoted(spelled(roll, k)) }), make("span", { class: "small", textContent: `id ${id} · position ${k}${special ? " · special" : ""}` }));
  if (off) { $("detail").replaceChildren(head, make("p", { textContent: "Not supervised: masked out of the loss." })); return; }
  const verdict = r > 0 ? "pushed down" : r < 0 ? "pushed up" : "unchanged";
  const facts = [["log q − log p", [make("b", { class: r > 0 ? "down" : "up", textContent: `${show(-r)} nats` }), ` ${verdict}`]],
    ["log p, log q", `${show(roll.s[k] / 100)}, ${show(roll.t[k] / 100)}`]];
  if (roll.rank) facts.push(["teacher's rank", String(roll.rank[k])]);
  if (roll.e) facts.push(["gradient norm", show(roll.e[k] / 100)]);
  const support = ["teacher", "student"].includes(roll.source) ? `${roll.source}'s top ${roll.k}` : `support (${roll.source})`;
  if (roll.in) facts.push([`in the ${support}`, outside(roll, k) ? "no" : "yes"], ["mass on it p, q", `${percent(roll.mass[0][k] / 1e4)}, ${percent(roll.mass[1][k] / 1e4)}`]);
  const entries = [];
  for (let j = 0; j < (roll.tops?.[k].length ?? 0); j += 3) entries.push(roll.tops[k].slice(j, j + 3));
  if (!entries.some(([other]) => other === id)) entries.push([id, roll.s[k], roll.t[k]]);
  const bar = (kind, x) => { const piece = make("i", { class: `bar ${kind}` }); piece.style.width = `${100 * probability(x)}%`; return make("td", { class: "cell" }, piece, make("span", { textContent: percent(probability(x)) })); };
  const rows = entries.map(([other, s, t]) => make("tr", { class: other === id ? "own" : "" }, make("td", {}, code(quoted(other === id ? spelled(roll, k) : textOf(state.run, other)))), bar("s", s), bar("t", t)));
  $("detail").replaceChildren(head, make("table", { class: "facts" }, make("tbody", {}, facts.map(([name, value]) => make("tr", {}, make("th", { scope: "row", textContent: name }), make("td", {}, value))))),
    make("table", { class: "both" }, make("thead", {}, make("tr", {}, make("th", { scope: "col", textContent: "next token" }), make("th", { scope: "col", textContent: "student" }), make("th", { scope: "col", textContent: "teacher" }))), make("tbody", {}, rows)),
    small(roll.tops ? "Sorted by the teacher's probability; tokens below 0.1 % in both models are omitted." : "The batch contains no probabilities of other tokens."));
}
function nextWorst() {
  const roll = shown[picked()];
  if (!roll || !about(roll).worst.length) return;
  worstAt = (worstAt + 1) % about(roll).worst.length;
  focusToken(about(roll).worst[worstAt]);
}
