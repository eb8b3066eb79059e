// The tokenizer panel: log-ratios by id, impossible tokens, EOS of the models, results of the doctor.
function drawTokens() { $("sheets").replaceChildren(...data.runs.map(tokenSheet)); }

function tokenSheet(run, i) {
  const name = (id) => code(quoted(textOf(i, id)));
  const labelled = (id) => run.special.includes(id) ? make("span", {}, name(id), make("span", { class: "tag", textContent: "special" })) : name(id);
  const share = (x) => [percent(x), x], count = (x) => [String(x), x], plain = (x) => [show(x), x];
  const ratio = ["|log p/q|", 1, "Share of the sum of |log p − log q|, p the student, q the teacher"];
  const square = ["‖grad‖²", 1, "Share of the sum of squared norms of the tokens' gradients in the logits"], mean = ["mean log p/q", 1, "Mean of log p − log q; positive: the teacher pushes the token down"];
  const blocks = [];
  const block = (title, ...nodes) => blocks.push(make("div", { class: "panel" }, make("h3", { textContent: title }), ...nodes));
  if (run.sheet.doctor) block(`opd doctor: ${run.sheet.doctor.verdict}`, table([["verdict"], ["item"], ["found"], ["advice"]],
    run.sheet.doctor.items.map((item) => [make("span", { class: `tag ${item.verdict}`, textContent: item.verdict }), words(item.item), item.found, item.advice]), "Doctor"));
  if (run.blame?.length) {
    const step = run.saved[run.saved.length - 1].step;
    block(`Token ids by share of |log p − log q|, step ${step}`, table([["token"], ["id", 1], ["count", 1], ["tokens", 1], ratio, square, mean],
      run.blame.map((row) => [labelled(row.id), count(row.id), count(row.count), share(row.tokens), share(row.signal), share(row.energy), plain(row.cost)]), "Token ids by share of the log-ratio"));
  }
  const bad = run.sheet.impossible;
  if (bad) block("Confident student, impossible for the teacher", make("p", {}, make("b", { textContent: percent(bad.share) }), " of the tokens and ", make("b", { textContent: percent(bad.signal) }), " of the sum of |log p − log q|: probability above 90 % in the student, below 0.01 % in the teacher. ", bad.share ? "If these are EOS tokens, tags or parts of a template, mask them or set map_eos; otherwise this is where the teacher corrects the student." : "This is healthy."),
    bad.rows.length ? table([["token"], ["id", 1], ["count", 1], ["student's log-prob", 1], ["teacher's", 1]], bad.rows.map((row) => [labelled(row.id), count(row.id), count(row.count), plain(row.student), plain(row.teacher)]), "Impossible tokens") : null);
  if (run.sheet.ends.length) {
    const differ = (key) => new Set(run.sheet.ends.map(key)).size > 1;
    const summary = differ((end) => end.ids.join()) ? "The models stop at different ids: without map_eos the teacher rejects the student's EOS." :
      differ((end) => end.own) ? "All models stop at the same ids, but their tokenizers have different EOS tokens: a teacher that was not trained with the student's EOS considers it impossible; see map_eos." : "All models have the same EOS.";
    block("End of a response", make("p", { textContent: summary }),
      table([["model"], ["EOS token"], ["stops at"]], run.sheet.ends.map((end) => [end.role, end.own === null ? "–" : code(quoted(end.own)), make("span", {}, end.ids.map((id, k) => make("span", { class: "entry" }, code(quoted(end.texts[k])), ` ${id}`)))]), "EOS tokens"),
      bad ? small(`${percent(bad.ended)} of the responses of the last saved batch ended with EOS.`) : null);
  }
  const present = run.sheet.special.filter((row) => row.count), absent = run.sheet.special.filter((row) => !row.count);
  if (run.sheet.special.length) block("Special tokens, last saved batch", present.length ? table([["token"], ["id", 1], ["count", 1], ratio, mean],
    present.map((row) => [name(row.id), count(row.id), count(row.count), share(row.signal), plain(row.cost)]), "Special tokens") : null,
    absent.length ? make("p", { class: "small" }, "Not in the loss: ", absent.flatMap((row, k) => [k ? ", " : null, name(row.id)]), ".") : null);
  if (run.sheet.unread.length) blocks.push(make("div", { class: "panel" }, make("h3", { textContent: "Not read" }), small(`The run refers to models outside its folder, whose tokenizers were not read: ${run.sheet.unread.join("; ")}. If you trust the run, use opd report with --models to read them.`)));
  if (!blocks.length) blocks.push(small("The run has no saved batches and no readable tokenizer."));
  return data.runs.length > 1 ? make("details", { class: "sheet", open: i === 0 }, make("summary", {}, make("b", { textContent: run.name })), make("div", { class: "panels" }, blocks)) : make("div", { class: "panels" }, blocks);
}

function drawSettings() {
  const many = data.runs.length > 1, text = (value) => typeof value === "string" ? value : JSON.stringify(value);
  const nodes = [];
  if (many) nodes.push(make("h3", { textContent: "Settings that differ" }), data.differences.length
    ? table([["setting"], ...data.runs.map((run) => [run.name])], data.differences.map((row) => row.map((cell, j) => j ? code(cell) : cell)), "Settings that differ") : small("None, except the run folders."));
  for (const run of data.runs) {
    const lines = run.code.split("\n"), first = lines[0], changed = lines.slice(1).join("\n").trim();
    nodes.push(make("details", { class: "sheet" }, make("summary", {}, make("b", { textContent: run.name }), ` ${first}${changed ? ", with uncommitted changes" : ""}`),
      small(run.folder), changed ? make("pre", { tabIndex: 0, textContent: changed }) : null,
      Object.keys(run.config).length ? table([["setting"], ["value"]], Object.entries(run.config).map(([key, value]) => [key, code(text(value))]), `Settings of ${run.name}`) : small("No config.json.")));
  }
  nodes.push(small(`Page generated ${data.made} with ${Object.entries(data.versions).map((pair) => pair.join(" ")).join(", ")}.`));
  $("provenance").replaceChildren(...nodes);
}
