// The panels of the section of curves: title, what is drawn, and what healthy looks like.
const PANELS = [
  ["divergence/reverse_kl", "Reverse KL to the teacher, nats per token", "Exact KL(student ‖ teacher) of the next token, averaged over the supervised tokens.", "falls, and levels off above 0; a rise of half is an alarm"],
  ["divergence/k1", "Reverse KL, sampled (k1), nats per token", "Mean of log p − log q of the sampled tokens: the same number in expectation, with sampling noise, so single steps may be negative.", "falls with the exact value"],
  ["response/reward", "Reward of the rollouts", "Mean grade of the responses.", "rises or stays, where the teacher is the better model"],
  ["divergence/student_entropy", "Student's entropy, nats per token", "Entropy of the student's next-token distribution.", "near the teacher's; a fall towards 0 is a collapse"],
  ["response/length", "Response length, tokens", "Sampled tokens of a response.", "steady, and below the budget"],
  ["response/truncated_share", "Share of truncated responses", "Responses that reached the budget without an EOS.", "low and steady"],
  ["signal/signal_top1_share", "Share of |log p − log q| in the top 1 % of tokens", "How much of the sum of absolute log-ratios the hundredth of the tokens with the largest ones holds.", "steady; near 1 a few tokens make the whole gradient"],
  ["divergence/outside_topk_expected", "Student's probability outside the top-K", "Probability that the student gives to tokens outside the ids on which both models are compared.", "falls; a growing one is not seen by a loss on the top-K"],
  ["grad_norm", "Gradient norm before clipping", "Euclidean norm over all trained weights.", "steady or falling, far above 0"],
  ["tokens/confident_impossible_signal", "Share of |log p − log q| on tokens ruled out by the teacher", "Tokens that the student is sure of and that have almost no probability under the teacher, such as another EOS.", "0, or a few per mille"],
  ["lr", "Learning rate", "That of the optimizer in this step.", "follows the schedule of the settings"],
  ["machine/tokens_per_second", "Throughput, tokens per second", "Sampled tokens of all processes over the time of the whole step.", "steady; it falls as responses become longer"],
  ["machine/peak_gib", "Peak memory, GiB", "Most memory that was in use: of the device in this step, or on a CPU of the process so far.", "steady; a rise at every step is a leak"],
];
const MORE = [
  ["held-out accuracy", "Held-out accuracy", "Share of right responses to problems that training never sees.", "rises; an interval that does not contain the first value is a change"],
  ["repetition/repeated_share", "Share of tokens in repeated 8-grams", "Sampled tokens that repeat an earlier 8-gram of their response.", "near 0"],
  ["loss", "Loss", "Value of the training objective; for score-function losses its level means nothing.", "finite"],
];
const ABOUT = new Map([...PANELS, ...MORE].map(([name, title, meaning, healthy]) => [name, { title, meaning, healthy }]));

// Columns that lie in [0, 1], and columns that are not negative: their bands end there.
const SHARE = /(_share|_mass|_prob|\/pass_\d+|outside_topk|outside_topk_expected|accuracy)$/;
const POSITIVE = /(^grad_norm|^lr|^machine\/.*|\/length|\/(reverse_kl|forward_kl|student_entropy|teacher_entropy|abs_ratio))$/;
function bounds(name, values) {
  const low = Math.min(...values), high = Math.max(...values);
  if (SHARE.test(name) && low >= 0 && high <= 1) return [0, 1];
  return POSITIVE.test(name) && low >= 0 ? [0, Infinity] : [-Infinity, Infinity];
}

// Labels of ticks with as many digits as it takes to tell them apart.
function tickLabels(ticks) {
  const values = ticks.filter(known), brief = (v, digits) => v !== 0 && Math.abs(v) < 1e-3 ? Number(v.toPrecision(digits)).toExponential().replaceAll("-", "−") : show(v, digits);
  let digits = 3;
  while (digits < 12 && new Set(values.map((v) => brief(v, digits))).size < values.length) digits++;
  return ticks.map((v) => known(v) ? brief(v, digits) : "");
}

// What is the same at every step: one line instead of a chart.
const CONSTANT_FROM = 5;
function constantValue(mine) {
  const values = mine.flatMap((line) => line.y);
  if (values.length < CONSTANT_FROM || mine.some((line) => line.y.length < 2)) return null;
  return values.every((v) => known(v) && v === values[0]) ? values[0] : null;
}

// The points of a chart as comma-separated values, as they are drawn: thinned, to five digits.
function csvOf(mine) {
  const cell = (x) => {
    if (!known(x)) return "";
    const text = typeof x === "string" && /^[=+\-@\t]/.test(x) ? `'${x}` : String(x);
    return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const rows = mine.flatMap((line) => line.x.map((step, k) => [data.runs[line.run].name, line.task, step, line.y[k], line.low[k], line.high[k]]));
  return [["run", "task", "step", "value", "low", "high"], ...rows].map((row) => row.map(cell).join(",")).join("\n") + "\n";
}
function download(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  make("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}
