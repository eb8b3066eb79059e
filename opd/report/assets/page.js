// The page: draws every section, connects the controls, and polls its server for updates when served.
function drawAll() {
  const title = data.runs.length > 1 ? `${data.runs.length} runs` : data.runs[0].name;
  $("title").textContent = title;
  document.title = `${title}: on-policy distillation`;
  $("made").textContent = data.made;
  drawVerdicts(); drawLegend(); drawCharts(); drawPositions(); drawFilters(); drawTokens(); drawSettings();
}
function setTheme(value) {
  document.documentElement.dataset.theme = value;
  tones.clear();
  drawLegend(); drawCharts(); drawPositions();
  const roll = shown[picked()];
  if (roll) drawStrip(roll);
}

const preference = matchMedia("(prefers-color-scheme: dark)");
document.documentElement.dataset.theme = preference.matches ? "dark" : "light";
preference.addEventListener("change", () => setTheme(preference.matches ? "dark" : "light"));
$("theme").addEventListener("click", () => setTheme(dark() ? "light" : "dark"));

$("picker").addEventListener("submit", (event) => {
  event.preventDefault();
  const name = $("column").value.trim();
  if (!name) return;
  const found = showColumn(name);
  $("picked").textContent = found ? "" : `No run recorded ${name}.`;
  if (found) $("column").value = "";
});
$("bands").addEventListener("change", drawCharts);
$("unzoom").addEventListener("click", () => { state.zoom = null; drawCharts(); });
$("map").addEventListener("change", drawPositions);
$("f-run").addEventListener("change", () => { state.key = ""; drawFilters(); });
for (const id of ["f-step", "f-task", "f-outcome", "f-order"]) $(id).addEventListener("change", drawList);
$("prev").addEventListener("click", () => pick(picked() - 1));
$("next").addEventListener("click", () => pick(picked() + 1));
$("worst").addEventListener("click", nextWorst);

for (const kind of ["pointerover", "click"]) $("text").addEventListener(kind, (event) => {
  const span = event.target.closest(".t");
  if (span) focusToken(Number(span.dataset.k), false);
});
for (const kind of ["pointerdown", "pointermove"]) $("strip").addEventListener(kind, (event) => {
  if (kind === "pointermove" && !event.buttons) return;
  const box = $("strip").getBoundingClientRect();
  focusToken(Math.min(spans.length - 1, Math.max(0, Math.floor((event.clientX - box.left) / barWidth()))));
});
const readingKeys = {
  n: () => pick(picked() + 1), p: () => pick(picked() - 1), w: nextWorst,
  ArrowRight: () => focusToken(Math.min(spans.length - 1, state.token + 1)), ArrowLeft: () => focusToken(Math.max(0, state.token - 1)),
  Home: () => focusToken(0), End: () => focusToken(spans.length - 1),
};
const listKeys = { ...readingKeys, ArrowDown: readingKeys.n, ArrowUp: readingKeys.p };
for (const [id, keys] of [["text", readingKeys], ["list", listKeys]]) $(id).addEventListener("keydown", (event) => {
  const act = keys[event.key];
  if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  act();
});
drawAll();
let width = $("charts").clientWidth;
new ResizeObserver(() => {
  if ($("charts").clientWidth === width) return;
  width = $("charts").clientWidth;
  resize(); redrawMaps();
  const roll = shown[picked()];
  if (roll) drawStrip(roll);
}).observe($("charts"));

// Updates keep selections, zoom, theme and scroll positions.
function renew(news) {
  const places = ["text", "list"].map((id) => [id, $(id).scrollTop]), y = window.scrollY, opened = [...document.querySelectorAll("details")].map((node) => node.open);
  const focus = document.activeElement?.id;
  document.body.style.minHeight = `${document.documentElement.scrollHeight}px`;
  data = news;
  drawAll();
  const all = [...document.querySelectorAll("details")];
  if (all.length === opened.length) all.forEach((node, i) => { node.open = opened[i]; });
  for (const [id, top] of places) $(id).scrollTop = top;
  if (focus && document.activeElement?.id !== focus) $(focus)?.focus({ preventScroll: true });
  document.body.style.minHeight = "";
  window.scrollTo({ top: y, behavior: "instant" });
}
if (document.documentElement.dataset.watch === "watch") {
  let version = null;
  const look = async () => {
    const start = performance.now();
    let failure = "the server does not answer";
    try {
      if (document.hidden) return;
      const now = await (await fetch("/version")).text();
      if (now !== version) {
        if (version !== null) {
          const answer = await fetch("/data");
          if (!answer.ok) throw new Error((failure = await answer.text()));
          renew(await answer.json());
        }
        version = now;
      }
      $("made").textContent = `live, ${data.made}`;
      $("made").classList.remove("lost");
    } catch {
      $("made").textContent = `${data.made}; ${failure}`;
      $("made").classList.add("lost");
    } finally {
      // rebuilding the data costs time, so long runs are polled less often
      setTimeout(look, Math.max(3000, 9 * (performance.now() - start)));
    }
  };
  look();
}
