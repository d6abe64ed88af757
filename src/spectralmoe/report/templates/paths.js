// Bands from the experts of a layer to those of the next; as wide as the tokens that went that way.
function pathBands(host) {
  const run = DATA.inspections[host.dataset.run], all = run.paths, state = { from: 0, pairs: Math.min(3, all.length), flows: 30 };
  const label = (place) => run.layers[place].label;
  const from = choice("From layer", all.map((path, i) => [i, label(path.from)]), (value) => set("from", value));
  const pairs = choice("Steps", [1, 2, 3, 4, 6].filter((n) => n <= all.length).map((n) => [n, n]), (value) => set("pairs", value), state.pairs);
  const flows = choice("Largest flows", [[10, "10 a step"], [30, "30 a step"], [60, "60 a step"]], (value) => set("flows", value), 30);
  const box = el("div", { class: "bands", tabindex: 0, role: "application", "aria-roledescription": "flow diagram",
    "aria-label": `Paths of tokens between the experts of ${run.title}. Arrow keys read the flows.` });
  const said = readout("Point at a band, or focus the diagram and use the arrow keys.");
  let chain = [], bands = [], at = 0;
  host.append(controls("Paths", from.node, pairs.node, flows.node),
    el("div", { class: "legend" }, el("span", { class: "sign" }, el("b", { class: "usual" }), "a flow"),
      el("span", { class: "sign" }, el("b", { class: "strong" }), "outlined: at least twice as large as if the layers chose independently")), box, said.node);
  const table = valuesTable(`${run.title}: largest flows of the steps shown`, () => ["step", "from expert", "to expert", "tokens", "share", "times chance"],
    () => chain.flatMap((path) => path.flows.slice(0, state.flows).map((flow) =>
      [`${label(path.from)} to ${label(path.to)}`, String(flow[0]), String(flow[1]), whole(flow[2]), share(flow[2] / path.total), figure(lift(path, flow))])));
  host.append(table.node);

  function set(name, value) {
    state[name] = Number(value);
    draw();
    table.refresh();
  }

  // How many times as large as if the two layers chose independently.
  const lift = (path, [i, j, count]) => (path.whole ? (count * path.total) / (path.out[i] * path.into[j]) : NaN);

  // As many steps from the chosen one as follow on each other.
  function chosen() {
    const found = [];
    for (let i = state.from; i < all.length && found.length < state.pairs; i++) {
      if (found.length && found[found.length - 1].to !== all[i].from) break;
      found.push(all[i]);
    }
    return found;
  }

  // Where each expert stands: [top, height] by expert, and how many pixels a token takes.
  function stand(sizes, height) {
    const total = Object.values(sizes).reduce((a, b) => a + b, 0), experts = Object.keys(sizes).map(Number).sort((a, b) => a - b);
    const gap = Math.min(6, (0.3 * height) / experts.length), scale = (height - gap * (experts.length - 1)) / (total || 1), found = {};
    let y = 0;
    for (const e of experts) {
      found[e] = { top: y, height: sizes[e] * scale, scale, out: y, into: y };
      y += sizes[e] * scale + gap;
    }
    return found;
  }

  function draw() {
    const width = box.clientWidth, height = 420, head = 22, side = 34;
    if (!width) return;
    chain = chosen();
    const places = [chain[0].from, ...chain.map((path) => path.to)], step = (width - 2 * side) / chain.length;
    const columns = places.map((place, k) => {
      const sizes = {}, grow = (held) => held.forEach((count, e) => count && (sizes[e] = Math.max(sizes[e] || 0, count)));
      if (k > 0) grow(chain[k - 1].into);
      if (k < chain.length) grow(chain[k].out);
      return stand(sizes, height);
    });
    const picture = shape("svg", { viewBox: `0 0 ${width} ${height + head + 4}`, width, height: height + head + 4, "aria-hidden": "true" });
    bands = chain.flatMap((path, k) => path.flows.slice(0, state.flows).map((flow) => ({ path, k, flow })));
    for (const band of [...bands].sort((a, b) => a.flow[0] - b.flow[0] || a.flow[1] - b.flow[1])) {
      const [i, j, count] = band.flow, a = columns[band.k][i], b = columns[band.k + 1][j];
      const x0 = side + band.k * step + 9, x1 = side + (band.k + 1) * step - 1, middle = (x0 + x1) / 2, w = count * a.scale, v = count * b.scale;
      const [y0, y1] = [head + a.out, head + b.into];
      a.out += w;
      b.into += v;
      band.node = shape("path", { class: lift(band.path, band.flow) >= 2 ? "band strong" : "band",
        d: `M${x0},${y0}C${middle},${y0} ${middle},${y1} ${x1},${y1}v${v}C${middle},${y1 + v} ${middle},${y0 + w} ${x0},${y0 + w}z`,
        onpointerenter: () => go(bands.indexOf(band)) });
      picture.append(band.node);
    }
    columns.forEach((column, k) => {
      const x = side + k * step;
      picture.append(shape("text", { x: x + 4, y: 12, "text-anchor": "middle", class: "strong" }, `layer ${label(places[k])}`));
      for (const [e, node] of Object.entries(column)) {
        picture.append(shape("rect", { class: "node", x, y: head + node.top, width: 8, height: Math.max(node.height, 0.6) }));
        if (node.height >= 9) picture.append(shape("text", { x: k < chain.length ? x - 4 : x + 12, y: head + node.top + node.height / 2 + 4, "text-anchor": k < chain.length ? "end" : "start", class: "halo" }, e));
      }
    });
    box.replaceChildren(picture);
  }

  function go(i) {
    bands.forEach(({ node }, k) => node.classList.toggle("on", k === i));
    at = i;
    const { path, flow } = bands[i], [a, b, count] = flow;
    said.tell(`layer ${label(path.from)} expert ${a} to layer ${label(path.to)} expert ${b}: ${whole(count)} tokens, ${share(count / path.total)}, ${figure(lift(path, flow))} times chance`);
  }

  const leave = () => {
    bands.forEach(({ node }) => node.classList.remove("on"));
    said.tell("");
  };
  box.addEventListener("pointerleave", leave);
  box.addEventListener("blur", leave);
  box.addEventListener("focus", () => box.matches(":focus-visible") && bands.length && go(at % bands.length));
  box.addEventListener("keydown", (event) => {
    const way = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
    if (way && bands.length) {
      event.preventDefault();
      go((at + way + bands.length) % bands.length);
    }
  });
  whenSized(box, draw);
  draw();
}
