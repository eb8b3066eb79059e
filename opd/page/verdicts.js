// Verdicts: what is wrong with each run and what to do, before any picture.
const alarmsOf = (run) => run.tasks.flatMap((part) => part.alarms.map((alarm) => ({ ...alarm, task: part.task })));

function drawVerdicts() {
  const ill = data.runs.filter((run) => alarmsOf(run).some((alarm) => alarm.on)).length;
  const n = data.runs.length, blind = data.runs.filter((run) => run.tasks.some((part) => part.unwatched.length)).length;
  const first = ill === 0 ? `No alarm is on in ${n === 1 ? "this run" : `any of the ${n} runs`}.` : n === 1 ? "Alarms are on." : `Alarms are on in ${ill} of ${n} runs.`;
  const second = blind ? " Some rules never saw their column: their silence says nothing." : "";
  $("headline").textContent = first + second;
  $("cards").replaceChildren(...data.runs.map(card));
  drawGains();
}

function card(run) {
  const alarms = alarmsOf(run), on = alarms.filter((alarm) => alarm.on), config = run.config;
  const verdict = on.length ? `${plural(on.length, "alarm")} on` : alarms.length ? "alarms are over" : run.done ? "no alarm" : "not begun";
  const about = [config.objective && words(config.objective), known(config.seed) && `seed ${config.seed}`, run.seconds > 0 && (run.seconds < 90 ? `${show(run.seconds, 2)} s` : `${show(run.seconds / 60, 2)} min`)];
  const steps = known(config.steps) ? `step ${run.done} of ${config.steps}${run.done < config.steps ? ", unfinished" : ""}` : `step ${run.done}`;
  return make("article", { class: `card ${on.length ? "bad" : alarms.length ? "over" : "good"}` },
    make("div", { class: "head" }, make("h3", { textContent: run.name }), make("span", { class: "pill", textContent: verdict })),
    small([steps, ...about.filter(Boolean)].join(" · ")),
    make("dl", { class: "tiles" }, tiles(run)),
    on.map(alarmItem), past(alarms.filter((alarm) => !alarm.on)), unwatched(run));
}
const past = (alarms) => !alarms.length ? null : make("details", { class: "small past" }, make("summary", { textContent: `${plural(alarms.length, "alarm")} over` }), alarms.map(alarmItem));

function tiles(run) {
  const made = [], tile = (name, from, to, more) => made.push(make("div", {}, make("dt", { textContent: name }),
    make("dd", {}, known(from) ? make("span", { class: "from", textContent: `${from} → ` }) : null, make("b", { textContent: to }), make("span", { class: "small", textContent: ` ${more}` }))));
  for (const task of new Set(run.evals.map((row) => row.task ?? ""))) {
    const mine = run.evals.filter((row) => (row.task ?? "") === task), a = mine[0], b = mine[mine.length - 1];
    tile(`held-out accuracy${task ? `, ${task}` : ""}`, mine.length > 1 ? a.accuracy.toFixed(3) : null, b.accuracy.toFixed(3), `[${b.low.toFixed(3)}, ${b.high.toFixed(3)}], n = ${b.problems}`);
  }
  for (const part of run.tasks) for (const [column, name] of [["drift/reverse_kl", "reverse KL, nats a token"], ["drift/k1", "sampled cost, nats a token"]]) {
    const curve = part.curves[column];
    if (!curve || (column === "drift/k1" && part.curves["drift/reverse_kl"])) continue;
    const values = curve[1].filter(known), error = curve[2] && curve[2][curve[1].findLastIndex(known)];
    tile(name + (part.task ? `, ${part.task}` : ""), values.length > 1 ? show(values[0]) : null, show(values[values.length - 1]), known(error) ? `± ${show(1.96 * error, 2)}` : "");
  }
  return made;
}

function alarmItem(alarm) {
  const error = alarm.error ? ` ± ${show(alarm.error, 2)}` : "";
  return make("div", { class: alarm.on ? "alarm on" : "alarm" },
    make("p", {}, make("b", { textContent: words(alarm.rule) }), ` ${alarm.task ? `in ${alarm.task} ` : ""}since step ${alarm.step}${alarm.on ? "" : ", over now"}: ${alarm.means}.`),
    make("p", {}, make("b", { class: "do", textContent: "Do: " }), `${alarm.remedy}.`),
    make("p", { class: "small" }, `${alarm.tested} was ${show(alarm.value)}${error}; healthy: ${alarm.range}. `,
      make("button", { type: "button", class: "link", textContent: "curve", "aria-label": `Show the curve of ${alarm.metric}`, onclick: () => showColumn(alarm.metric) })));
}

function unwatched(run) {
  const names = [...new Set(run.tasks.flatMap((part) => part.unwatched))];
  const rules = data.rules.filter((rule) => names.includes(rule.name)), all = data.rules.length;
  if (!rules.length) return small(`All ${all} rules were watched.`);
  return make("details", { class: "small" }, make("summary", { textContent: `${plural(rules.length, "rule")} of ${all} not watched` }),
    make("ul", {}, rules.map((rule) => make("li", { textContent: `${words(rule.name)}: no row has ${rule.metric}` }))));
}

function drawGains() {
  const signed = (x) => (x >= 0 ? "+" : "−") + Math.abs(x).toFixed(3);
  if (!data.gains.length) { $("gains").replaceChildren(); return; }
  const rows = data.gains.map((row) => [row.paired ? words(row.objective) : `${words(row.objective)} (not paired)`, [String(row.seeds), row.seeds], [String(row.problems), row.problems], [row.before.toFixed(3), row.before],
    [row.after.toFixed(3), row.after], [`${signed(row.gain)} [${signed(row.low)}, ${signed(row.high)}]`, row.gain]]);
  $("gains").replaceChildren(make("h3", { textContent: "Held-out accuracy before and after" }),
    table([["objective"], ["runs", 1], ["problems", 1], ["before", 1], ["after", 1], ["gain [95 %]", 1]], rows, "Gains"),
    small(`${data.gains.every((row) => row.paired) ? "Gains are paired by problem" : "Gains are paired by problem where the last problems are the first ones, else not"}; the intervals are over problems and runs. Only seeds of one method share a line: what else differs between runs is named.`));
}
