// The data of the page, and short ways to make elements. Text goes in as text, never as markup.
const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const shape = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

// Three significant digits, as in the tables.
function figure(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "no data";
  const size = Math.abs(value);
  for (const [unit, letter] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= unit) return Number((value / (letter === "k" ? 1e3 : unit)).toPrecision(3)) + letter;
  }
  return size >= 1000 ? value.toFixed(0) : String(Number(value.toPrecision(3)));
}

// Few letters, for a cell of a map.
const brief = (value) => (Math.abs(value) < 10 ? String(Number(value.toFixed(2))) : figure(value));
const whole = (value) => Math.round(value).toLocaleString("en");
const share = (part) => (part === 0 ? "0%" : (100 * part).toFixed(part < 0.1 ? 1 : 0) + "%");

// Values packed at `bits` bits each: code 0 is no data (NaN), the others go evenly from low to high.
function unpack(text, count, bits, low, high) {
  const bytes = atob(text), found = new Float32Array(count), top = 2 ** bits - 2;
  let held = 0, kept = 0, next = 0;
  for (let i = 0; i < count; i++) {
    while (kept < bits) {
      held = ((held << 8) | bytes.charCodeAt(next++)) & 0xffff;
      kept += 8;
    }
    kept -= bits;
    const code = (held >> kept) & (2 ** bits - 1);
    found[i] = code === 0 ? NaN : low + ((code - 1) / top) * (high - low);
  }
  return found;
}

// What a text would hide is shown; with ``breaks`` its lines stay.
const visible = (text, breaks = false) => text.replaceAll("\n", breaks ? "⏎\n" : "⏎").replaceAll("\t", "⇥");

let identifiers = 0;
const fresh = (name) => `${name}-${++identifiers}`;

// A labelled <select>; options are [value, text].
function choice(label, options, change, chosen) {
  const id = fresh("choice");
  const select = el("select", { id, onchange: () => change(select.value) });
  for (const [value, text] of options) select.append(el("option", { value }, text));
  if (chosen !== undefined) select.value = chosen;
  return { node: el("span", { class: "control" }, el("label", { for: id }, label), select), select };
}

// A labelled checkbox.
function check(label, change) {
  const box = el("input", { type: "checkbox", onchange: () => change(box.checked) });
  return el("label", { class: "control" }, box, label);
}

const controls = (label, ...children) => el("div", { class: "controls", role: "group", "aria-label": label }, ...children);

// What the pointer or the arrow keys are on, told to screen readers too.
function readout(hint) {
  const node = el("output", { class: "readout", "aria-live": "polite" }, hint);
  return { node, tell: (text) => (node.textContent = text || hint) };
}

// The same values as a table, made when it is opened.
function valuesTable(caption, head, rows) {
  const box = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption });
  const refresh = () => {
    const made = el("table", {}, el("caption", {}, caption));
    made.append(el("thead", {}, el("tr", {}, ...head().map((text) => el("th", { scope: "col" }, text)))));
    const body = el("tbody");
    for (const [first, ...rest] of rows()) {
      body.append(el("tr", {}, el("th", { scope: "row" }, first), ...rest.map((text) => el("td", {}, text))));
    }
    made.append(body);
    box.replaceChildren(made);
  };
  const node = el("details", { class: "values", ontoggle: () => node.open && refresh() }, el("summary", {}, "Values as a table"), box);
  return { node, refresh: () => node.open && refresh() };
}

// Call draw now, and again when the width of the node changes.
function whenSized(node, draw) {
  let width = 0;
  new ResizeObserver(() => {
    if (node.clientWidth && Math.abs(node.clientWidth - width) > 1) {
      width = node.clientWidth;
      draw();
    }
  }).observe(node);
}
