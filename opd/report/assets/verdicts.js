// Verdicts: the result of each run, its alarms and what to do.
const alarmsOf = (run) => run.tasks.flatMap((part) => part.alarms.map((alarm) => ({ ...alarm, task: part.task })));

function drawVerdicts() {
  const n = data.runs.length, count = (state) => data.runs.filter((run) => run.verdict.state === state).length;
  const ill = data.runs.filter((run) => run.verdict.alarms.length).length, worse = data.runs.filter((run) => run.verdict.changes.some((change) => change.shown === "worse")).length;
  const parts = n === 1 ? [{ good: "The run shows a significant improvement.", open: "The run shows no significant change.", bad: "" }[data.runs[0].verdict.state]]
    : [`Significant improvement and no active alarm: ${count("good")} of ${n} runs.`, `No significant change: ${count("open")}.`];
  if (ill) parts.push(n === 1 ? "Alarms are active." : `Active alarms: ${ill}.`);
  if (worse) parts.push(n === 1 ? "It shows a significant deterioration." : `Significant deterioration: ${worse}.`);
  if (data.runs.some((run) => run.tasks.some((part) => part.unwatched.length))) parts.push("Some alarm rules were not evaluated: their columns were not recorded.");
  $("headline").textContent = parts.filter(Boolean).join(" ");
  $("cards").replaceChildren(...data.runs.map(card));
  drawGains();
}

function card(run) {
  const alarms = alarmsOf(run), on = alarms.filter((alarm) => alarm.on), config = run.config;
  const verdict = on.length ? `${plural(on.length, "alarm")} on` : { good: improvement(run.verdict.changes), open: run.done ? "nothing shown" : "not started", bad: "worse" }[run.verdict.state];
  const about = [config.objective && words(config.objective), known(config.seed) && `seed ${config.seed}`, run.seconds > 0 && (run.seconds < 90 ? `${show(run.seconds, 2)} s` : `${show(run.seconds / 60, 2)} min`)];
  const steps = known(config.steps) ? `step ${run.done} of ${config.steps}${run.done < config.steps ? ", unfinished" : ""}` : `last row: step ${run.done - 1}`;
  return make("article", { class: `card ${{ good: "good", open: "over", bad: "bad" }[run.verdict.state]}` },
    make("div", { class: "head" }, make("h3", { textContent: run.name }), make("span", { class: "pill", textContent: verdict })),
    small([steps, ...about.filter(Boolean)].join(" · ")),
    make("dl", { class: "tiles" }, run.verdict.changes.map(changeTile)),
    on.map(alarmItem), past(alarms.filter((alarm) => !alarm.on)), unwatched(run), run.notes.map(small));
}
// What is better: alone "better" where everything that was measured is.
function improvement(changes) {
  const better = changes.filter((change) => change.shown === "better"), measured = changes.filter((change) => known(change.change));
  return better.length === measured.length ? "better" : `${[...new Set(better.map((change) => change.quantity))].join(", ")} better`;
}
const past = (alarms) => !alarms.length ? null : make("details", { class: "small past" }, make("summary", { textContent: `${plural(alarms.length, "alarm")}, no longer on` }), alarms.map(alarmItem));

// A quantity before and after, the change with its 95 % interval, and the conclusion.
function changeTile(change) {
  const signed = (x) => (x >= 0 ? "+" : "−") + show(Math.abs(x)), name = change.quantity + (change.task ? `, ${change.task}` : "");
  if (!known(change.change)) return make("div", {}, make("dt", { textContent: name }), make("dd", {}, make("b", { textContent: "nothing shown" }), make("span", { class: "small", textContent: ` ${change.basis}` })));
  return make("div", {}, make("dt", { textContent: name }), make("dd", {}, make("span", { class: "from", textContent: `${show(change.before)} → ` }), make("b", { textContent: show(change.after) }),
    make("span", { class: "small", textContent: ` ${signed(change.change)} [${signed(change.low)}, ${signed(change.high)}], ${change.shown}; ${change.basis}` })));
}

function alarmItem(alarm) {
  const error = alarm.error ? ` ± ${show(alarm.error, 2)}` : "";
  return make("div", { class: alarm.on ? "alarm on" : "alarm" },
    make("p", {}, make("b", { textContent: words(alarm.rule) }), ` ${alarm.task ? `in ${alarm.task} ` : ""}since step ${alarm.step}${alarm.on ? "" : ", no longer on"}: ${alarm.means}.`),
    make("p", {}, make("b", { class: "do", textContent: "Do: " }), `${alarm.remedy}.`),
    make("p", { class: "small" }, `${alarm.tested} was ${show(alarm.value)}${error}; healthy: ${alarm.range}. `,
      make("button", { type: "button", class: "link", textContent: "curve", "aria-label": `Show the curve of ${alarm.metric}`, onclick: () => showColumn(alarm.metric) })));
}

function unwatched(run) {
  const names = [...new Set(run.tasks.flatMap((part) => part.unwatched))];
  const rules = data.rules.filter((rule) => names.includes(rule.name)), all = data.rules.length;
  if (!rules.length) return small(`All ${all} alarm rules were evaluated.`);
  return make("details", { class: "small" }, make("summary", { textContent: `${plural(rules.length, "alarm rule")} of ${all} not evaluated` }),
    make("ul", {}, rules.map((rule) => make("li", { textContent: `${words(rule.name)}: ${rule.metric} was not recorded` }))));
}

function drawGains() {
  const signed = (x) => (x >= 0 ? "+" : "−") + Math.abs(x).toFixed(3);
  if (!data.gains.length) { $("gains").replaceChildren(); return; }
  const rows = data.gains.map((row) => [row.paired ? words(row.objective) : `${words(row.objective)} (not paired)`, [String(row.seeds), row.seeds], [String(row.problems), row.problems], [row.before.toFixed(3), row.before],
    [row.after.toFixed(3), row.after], [`${signed(row.gain)} [${signed(row.low)}, ${signed(row.high)}]`, row.gain]]);
  $("gains").replaceChildren(make("h3", { textContent: "Held-out accuracy before and after" }),
    table([["objective"], ["runs", 1], ["problems", 1], ["before", 1], ["after", 1], ["gain [95 %]", 1]], rows, "Gains"),
    small(`${data.gains.every((row) => row.paired) ? "Gains are paired by problem" : "Gains are paired by problem where the first and the last evaluation have the same problems, else unpaired"}; the intervals are over problems and runs. Each line averages over the seeds of one method; other differing settings are part of its name.`));
}
