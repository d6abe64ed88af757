// Running text: every token in the colour of the expert that it leans on in one layer.
// Backgrounds of dark words, apart for every kind of colour-blind eyes (tests/report/test_running_text.py measures it).
const WORDS = ["#5a86dd", "#ffcd73", "#21b99d", "#ca6e52", "#cbffc7", "#8d8ebc", "#93c78c", "#9e9724"];
const OTHER = "#dddddd";

function runningText(host) {
  const run = DATA.inspections[host.dataset.run], passages = run.text;
  const usable = run.layers.map((_, i) => i).filter((i) => passages.some((passage) => passage.layers[i]));
  const state = { layer: usable[0], expert: null };
  const leaning = (passage) => {
    const held = passage.layers[state.layer];
    if (held) held.values ??= unpack(held.weights, passage.pieces.length, 8, 0, held.high);
    return held;
  };
  const pick = choice("Layer", usable.map((i) => [i, run.layers[i].label]), (i) => {
    Object.assign(state, { layer: Number(i), expert: null });
    update();
  });
  const numbered = check("expert numbers in the text", (on) => box.classList.toggle("numbered", on));
  const keys = el("div", { class: "keys", role: "group", "aria-label": "Experts of the layer: press one to see its tokens alone" });
  const said = readout("Point at a token, or focus a text and use the arrow keys.");
  const texts = passages.map((passage) => tokenText(passage, (i) => said.tell(i === null ? "" : tell(passage, i))));
  const box = el("div", {}, ...passages.flatMap((passage, k) => [passage.title ? el("h4", {}, el("bdi", {}, passage.title)) : null, texts[k].node]).filter(Boolean));
  const cut = passages.some((passage) => passage.pieces.length < passage.all);
  host.append(controls("Running text", pick.node, numbered), keys, box, said.node,
    el("p", { class: "hint" }, cut ? "The first tokens of each passage; inspection.json has them all." : ""));
  const table = valuesTable(`${run.title}: experts of the tokens`, () => ["token", "text", "expert", "weight"],
    () => passages.flatMap((passage) => passage.pieces.map((piece, i) => [String(i), visible(piece), name(expertOf(passage, i)), figure(leaning(passage)?.values[i])])));
  host.append(table.node);

  const expertOf = (passage, i) => leaning(passage)?.experts[i] ?? -1;
  const name = (expert) => (expert < 0 ? "none" : String(expert));
  function tell(passage, i) {
    const expert = expertOf(passage, i), where = `layer ${run.layers[state.layer].label}, token ${i} “${visible(passage.pieces[i])}”`;
    return expert < 0 ? `${where}: no expert` : `${where}: expert ${expert}, weight ${figure(leaning(passage).values[i])}`;
  }

  // Up to eight experts have a colour each: all in their order, or those with most tokens.
  function colours() {
    const counts = new Map(), experts = run.layers[state.layer].experts;
    for (const passage of passages) for (const e of leaning(passage)?.experts ?? []) counts.set(e, (counts.get(e) || 0) + 1);
    const seen = [...counts.keys()].filter((e) => e >= 0).sort((a, b) => counts.get(b) - counts.get(a) || a - b);
    const chosen = (experts <= WORDS.length ? seen.map((e) => [e, WORDS[e]]) : seen.slice(0, WORDS.length).map((e, i) => [e, WORDS[i]]));
    return { counts, seen, of: new Map(chosen.sort(([a], [b]) => a - b)) };
  }

  function update() {
    const { counts, seen, of } = colours(), total = [...counts.values()].reduce((a, b) => a + b, 0), rest = seen.filter((e) => !of.has(e));
    const key = (expert, colour) => {
      const shade = el("b", { "aria-hidden": "true" }, String(expert));
      shade.style.background = colour;
      return el("button", { type: "button", "aria-pressed": String(state.expert === expert), onclick: () => {
        state.expert = state.expert === expert ? null : expert;
        update();
      } }, shade, `expert ${expert}, ${share(counts.get(expert) / total)} of the tokens`);
    };
    const others = el("span", { class: "sign" }, rest.length ? `${rest.length} other experts are grey: ` : "");
    for (const expert of rest) others.append(el("button", { type: "button", "aria-pressed": String(state.expert === expert), "aria-label": `expert ${expert}`, onclick: () => {
      state.expert = state.expert === expert ? null : expert;
      update();
    } }, String(expert)));
    const at = [...keys.querySelectorAll("button")].indexOf(document.activeElement);
    keys.replaceChildren(...[...of].map(([expert, colour]) => key(expert, colour)), ...(rest.length ? [others] : []));
    keys.querySelectorAll("button")[at]?.focus();
    passages.forEach((passage, k) => texts[k].paint((i) => {
      const expert = expertOf(passage, i);
      return { expert, colour: of.get(expert) || OTHER, faint: expert < 0 || (state.expert !== null && state.expert !== expert), title: tell(passage, i) };
    }));
    table.refresh();
  }
  update();
}

// One passage: a token a span; pointer and arrow keys read them.
function tokenText(passage, tell) {
  const spans = passage.pieces.map((piece) => el("span", { class: "token" }, visible(piece, true)));
  const node = el("div", { class: "running", tabindex: 0, role: "application", "aria-roledescription": "text coloured by expert", dir: "auto",
    "aria-label": `${passage.title || "Running text"}. Arrow keys read the tokens.` }, ...spans);
  let at = 0;

  function go(i) {
    spans[at].classList.remove("on");
    at = Math.min(Math.max(i, 0), spans.length - 1);
    spans[at].classList.add("on");
    tell(at);
  }
  const leave = () => {
    spans[at]?.classList.remove("on");
    tell(null);
  };
  // The token nearest to this one in the line above (-1) or below (1).
  function line(way) {
    let i = at;
    while (spans[i + way] && spans[i].offsetTop === spans[at].offsetTop) i += way;
    const top = spans[i].offsetTop;
    let best = i;
    for (; spans[i]?.offsetTop === top; i += way) {
      if (Math.abs(spans[i].offsetLeft - spans[at].offsetLeft) < Math.abs(spans[best].offsetLeft - spans[at].offsetLeft)) best = i;
    }
    return best;
  }
  node.addEventListener("pointermove", (event) => {
    const i = spans.indexOf(event.target.closest(".token"));
    if (i >= 0) go(i);
    else if (document.activeElement !== node) leave();
  });
  node.addEventListener("pointerleave", () => document.activeElement !== node && leave());
  node.addEventListener("focus", () => node.matches(":focus-visible") && spans.length && go(at));
  node.addEventListener("blur", leave);
  node.addEventListener("keydown", (event) => {
    const place = { ArrowLeft: () => at - 1, ArrowRight: () => at + 1, ArrowUp: () => line(-1), ArrowDown: () => line(1), Home: () => 0, End: () => spans.length - 1 }[event.key];
    if (!place || !spans.length) return;
    event.preventDefault();
    go(place());
    spans[at].scrollIntoView({ block: "nearest" });
  });

  function paint(look) {
    let before = null;
    spans.forEach((span, i) => {
      const { expert, colour, faint, title } = look(i);
      span.style.setProperty("--expert", colour);
      span.classList.toggle("faint", faint);
      span.title = title;
      if (expert !== before) span.dataset.number = expert < 0 ? "–" : expert;
      else delete span.dataset.number;
      before = expert;
    });
  }
  return { node, paint };
}
