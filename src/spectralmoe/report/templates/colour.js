// Colours that stay apart for colour-blind eyes, in both themes; and the switch between the themes.
const RAMPS = {
  light: {
    sequential: ["#f3f5f8", "#c3d7ee", "#6d9fd6", "#2566b0", "#0a2d60"],
    diverging: ["#14559c", "#7fb0de", "#f1f1ef", "#eda766", "#a84c00"],
    ink: "#1b1e23", soft: "#5b626c", line: "#d9dce1", hatch: "#a9afb8", paper: "#ffffff",
  },
  dark: {
    sequential: ["#1b1f26", "#1f3d66", "#2f6db3", "#7db0ea", "#e4f0ff"],
    diverging: ["#7abaff", "#2b5f9b", "#272b32", "#96581a", "#ffa651"],
    ink: "#e7e9ec", soft: "#a3abb6", line: "#363b44", hatch: "#6b7380", paper: "#14171c",
  },
};
const SERIES = ["#2f78c4", "#d1690e", "#179a74", "#b8569b", "#8a7a2c", "#6f6f78"];
const DASHES = ["", "6 3", "2 3", "8 3 2 3", "12 4", "1 4"];

const redraws = new Set();
let printing = false;

const wanted = () => document.documentElement.dataset.theme;
const dark = () => !printing && (wanted() === "dark" || (wanted() !== "light" && matchMedia("(prefers-color-scheme: dark)").matches));
const palette = () => RAMPS[dark() ? "dark" : "light"];
const redraw = () => redraws.forEach((draw) => draw());

function mix(stops, t) {
  const place = Math.min(Math.max(t, 0), 1) * (stops.length - 1), i = Math.min(Math.floor(place), stops.length - 2);
  const part = (stop, k) => parseInt(stop.slice(1 + 2 * k, 3 + 2 * k), 16);
  return [0, 1, 2].map((k) => Math.round(part(stops[i], k) + (place - i) * (part(stops[i + 1], k) - part(stops[i], k))));
}

const css = ([r, g, b]) => `rgb(${r},${g},${b})`;
const sequential = (t) => mix(palette().sequential, t);
const diverging = (t) => mix(palette().diverging, (t + 1) / 2); // t from -1 to 1
const evenly = (times) => diverging(Math.log2(Math.max(times, 1e-9)) / 3); // 1/8 to 8 times an even share
const over = ([r, g, b]) => (0.3 * r + 0.59 * g + 0.11 * b > 140 ? "#14171c" : "#ffffff"); // ink on a colour

// A strip of colour with ticks [place 0 to 1, text], and what the signs mean.
function legend(paint, ticks, signs) {
  const canvas = el("canvas", { width: 160, height: 10, "aria-hidden": "true" });
  const draw = () => {
    const pen = canvas.getContext("2d");
    for (let x = 0; x < 160; x++) {
      pen.fillStyle = css(paint(x / 159));
      pen.fillRect(x, 0, 1, 10);
    }
  };
  draw();
  redraws.add(draw);
  const labels = ticks.map(([place, text]) => {
    const tick = el("span", {}, text);
    tick.style.left = `${100 * place}%`;
    return tick;
  });
  return el("div", { class: "legend" }, el("div", { class: "strip" }, canvas, el("div", { class: "ticks" }, ...labels)),
    ...signs.map(([sign, text]) => el("span", { class: "sign" }, el("b", { class: sign, "aria-hidden": "true" }), text)));
}

function themeSwitch(host) {
  const group = el("fieldset", { class: "theme" }, el("legend", {}, "Theme"));
  for (const name of ["auto", "light", "dark"]) {
    const change = () => {
      document.documentElement.dataset.theme = name;
      redraw();
    };
    const box = el("input", { type: "radio", name: "theme", value: name, onchange: change });
    box.checked = name === "auto";
    group.append(el("label", {}, box, el("span", {}, name)));
  }
  host.append(group);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}
