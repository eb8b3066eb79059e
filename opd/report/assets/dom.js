// Helpers of all sections: nodes, number formats, colours, tables.
const $ = (id) => document.getElementById(id);

function make(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key === "class") node.className = value;
    else if (key === "colour") node.style.background = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key in node && key !== "list") node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}
const small = (text) => make("p", { class: "small", textContent: text });
const code = (text) => make("code", { textContent: text });

const known = (x) => x !== null && x !== undefined;
const show = (x, digits = 3) => known(x) ? Number(x.toPrecision(digits)).toString().replace("-", "−") : "–";
function percent(x) {
  if (!known(x)) return "–";
  if (x > 0 && x < 1e-6) return "< 0.0001 %";
  return `${show(100 * x, x > 0.999 && x < 1 ? 5 : x < 1e-3 ? 2 : 3)} %`;
}
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
// The name of a column may be broken after its slashes and underscores.
const breakable = (name) => name.split(/(?<=[/_])/).flatMap((part, k) => [k ? make("wbr") : null, part]);
const words = (name) => name.replaceAll("_", " ");

// The palette of Okabe and Ito, with lighter colours of the same hues for the dark theme.
const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#b5579a", "#b98500", "#3f9fd0", "#666f78", "#7a5c17"];
const DARK = ["#56b4e9", "#f08c3c", "#4cc38a", "#e39bc4", "#f2be4b", "#9ad0f5", "#a9b1b8", "#d3b45c"];
const dark = () => document.documentElement.dataset.theme === "dark";
const colour = (i) => (dark() ? DARK : LIGHT)[i % LIGHT.length];
// Runs 9 to 16 reuse the first eight colours with dashed lines.
const dashed = (i) => i % (2 * LIGHT.length) >= LIGHT.length;
const swatch = (i) => make("i", { class: dashed(i) ? "swatch again" : "swatch", colour: colour(i) });
const faded = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, "0");
const tones = new Map(); // cached colours of the theme
function css(name) {
  if (!tones.has(name)) tones.set(name, getComputedStyle(document.documentElement).getPropertyValue(name).trim());
  return tones.get(name);
}

// Size a canvas in CSS pixels at the screen's resolution.
function sharpen(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

// Heads are [name, numeric?, what it is?]; a cell is a node, a text or [node or text, sort key].
function table(heads, rows, label) {
  const body = make("tbody");
  const lines = rows.map((row) => ({
    keys: row.map((cell) => (Array.isArray(cell) ? cell[1] : cell)),
    node: make("tr", {}, row.map((cell, j) => make("td", { class: heads[j][1] ? "n" : "" }, Array.isArray(cell) ? cell[0] : cell))),
  }));
  body.append(...lines.map((line) => line.node));
  const sortable = rows.length > 2 && rows.some((row) => row.some(Array.isArray));
  const cells = heads.map(([name, numeric, about], j) => {
    const head = make("th", { class: numeric ? "n" : "", scope: "col", title: about ?? "" });
    if (!sortable || !numeric) { head.textContent = name; return head; }
    head.append(make("button", { type: "button", class: "sort", textContent: name, onclick: () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      cells.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      lines.sort((a, b) => ((b.keys[j] ?? -Infinity) - (a.keys[j] ?? -Infinity)) * (down ? 1 : -1));
      body.append(...lines.map((line) => line.node));
    } }));
    return head;
  });
  return make("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": label ?? "table" },
    make("table", {}, make("thead", {}, make("tr", {}, cells)), body));
}

// Fill a select; keep the selected value if it still exists.
function options(select, values) {
  const old = select.value;
  select.replaceChildren(...values.map(([value, label]) => make("option", { value, textContent: label })));
  if (values.some(([value]) => value === old)) select.value = old;
}

let data = JSON.parse($("data").textContent);
const state = { extra: [], hidden: new Set(), zoom: null, key: "", token: 0, run: 0 };

// One entry per task of each run; each has a line in the charts and a map.
const lines = () => data.runs.flatMap((run, i) => run.tasks.map((part) => ({
  part, run: i, task: part.task, label: data.runs.length > 1 || !part.task ? run.name + (part.task ? ` · ${part.task}` : "") : part.task,
}))).map((line, i) => ({ ...line, i }));
const visibleLines = () => lines().filter((line) => !state.hidden.has(line.label));
