// What the experts get: labels against experts, and tokens or pieces of images by expert.
function associationMap(host) {
  const run = DATA.inspections[host.dataset.run], layers = run.layers.filter((layer) => layer.association);
  let layer = layers[0];
  const get = (r, c) => {
    const held = layer.association;
    held.shares ??= unpack(held.values, held.labels.length * layer.experts, 8, 0, 1);
    return held.shares[r * layer.experts + c] ** 2;
  };
  const experts = () => [...Array(layer.experts).keys()], labels = () => layer.association.labels, note = el("p", { class: "hint" });
  const short = (text) => (text.length > 22 ? text.slice(0, 21) + "…" : text);
  const pick = choice("Layer", layers.map((one, i) => [i, one.label]), (i) => {
    layer = layers[i];
    update();
  });
  host.append(controls("Labels", pick.node), legend(sequential, [[0, "0"], [0.5, "50%"], [1, "of a label's tokens"]], SIGNS.slice(1)), note);
  const draw = heatMap(host, {
    label: `Labels by experts of ${run.title}`,
    rows: () => labels().map(short), columns: experts, rowTitle: () => "label", columnTitle: () => "expert",
    cell: get, paint: sequential, write: share,
    tell: (r, c) => `layer ${layer.label}, ${labels()[r]}: ${Number.isNaN(get(r, c)) ? "no data" : share(get(r, c))} of its ${whole(layer.association.totals[r])} tokens went to expert ${c}`,
  });
  const table = valuesTable(`${run.title}: share of each label's tokens`, () => ["label", "tokens", ...experts().map((e) => `expert ${e}`)],
    () => labels().map((text, r) => [text, whole(layer.association.totals[r]), ...experts().map((e) => (Number.isNaN(get(r, e)) ? "no data" : share(get(r, e))))]));
  host.append(table.node);
  function update() {
    const { labels: kept, all } = layer.association;
    note.textContent = `Layer ${layer.label}` + (kept.length < all ? `, the ${kept.length} labels with most tokens, of ${all}` : "");
    draw();
    table.refresh();
  }
  update();
}

function exampleList(host) {
  const run = DATA.inspections[host.dataset.run], layers = run.layers.filter((layer) => layer.examples.some((list) => list.length));
  const list = el("div", { class: "examples", "aria-live": "polite" }), { shown, total } = run.examples;
  const layerChoice = choice("Layer", layers.map((layer, i) => [i, layer.label]), () => offer());
  const expertChoice = choice("Expert", [], () => show());
  host.append(controls("Examples", layerChoice.node, expertChoice.node),
    el("p", { class: "hint" }, shown < total ? `${whole(shown)} of ${whole(total)} examples are in this page, those of the busiest experts first.` : ""), list);

  function offer() {
    const layer = layers[layerChoice.select.value], order = layer.examples.map((_, e) => e).filter((e) => layer.examples[e].length);
    if (layer.counts) order.sort((a, b) => layer.counts[b] - layer.counts[a]);
    const slots = layer.counts ? layer.counts.reduce((a, b) => a + b, 0) : 0;
    const text = (e) => `expert ${e}` + (slots ? ` (${share(layer.counts[e] / slots)} of the load)` : "");
    const every = layer.experts <= 16 ? [el("option", { value: "all" }, "all experts")] : [];
    expertChoice.select.replaceChildren(...every, ...order.map((e) => el("option", { value: e }, text(e))));
    show();
  }

  function show() {
    const layer = layers[layerChoice.select.value], wanted = expertChoice.select.value;
    const experts = wanted === "all" ? [...Array(layer.experts).keys()] : [Number(wanted)];
    list.replaceChildren(...experts.map((e) => el("section", { class: "expert", "aria-label": `layer ${layer.label}, expert ${e}` }, el("h4", {}, `Layer ${layer.label}, expert ${e}`),
      layer.examples[e].length ? el("ol", {}, ...layer.examples[e].map(item)) : el("p", { class: "none" }, "no data"))));
  }

  function item({ text = "", before = "", after = "", image, weight }) {
    const value = weight === undefined ? null : el("span", { class: "weight" }, figure(weight));
    if (image) return el("li", { class: "patch" }, el("img", { src: image, alt: text || "a piece of an image" }), el("span", {}, el("bdi", {}, text)), value);
    return el("li", {}, el("span", { class: "context", dir: "auto" }, el("bdi", {}, visible(before)), el("mark", {}, el("bdi", {}, visible(text) || "␣")), el("bdi", {}, visible(after))), value);
  }
  offer();
}
