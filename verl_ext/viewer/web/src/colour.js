// Advantages as colours: orange below zero, blue above (told apart with every common colour blindness), grey at zero.
const LIGHT = ["#b35806", "#e08214", "#fdb863", "#fee0b6", "#f2f2f2", "#d1e5f0", "#92c5de", "#4393c3", "#2166ac"];
const DARK = ["#f6a04d", "#c9762c", "#8f551f", "#55371d", "#343a42", "#1f415c", "#2a6390", "#3f8fc8", "#78c3f5"];
const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

export function colour(value, most, dark) {
  const stops = dark ? DARK : LIGHT;
  const at = (Math.max(-1, Math.min(1, most > 0 ? value / most : 0)) + 1) * 4;
  const below = Math.min(7, Math.floor(at)), share = at - below;
  const [a, b] = [rgb(stops[below]), rgb(stops[below + 1])];
  const mixed = a.map((v, i) => Math.round(v + (b[i] - v) * share));
  const light = (0.299 * mixed[0] + 0.587 * mixed[1] + 0.114 * mixed[2]) / 255;
  return { background: `rgb(${mixed.join(" ")})`, color: light > 0.55 ? "#111" : "#fff" };
}

// Okabe and Ito's categories, in an order that works on light and dark.
export const SERIES = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#999999", "#b8a800"];

export const signed = (value, digits = 2) =>
  value === null || value === undefined ? "–" : value === 0 ? "0" : `${value > 0 ? "+" : "−"}${Math.abs(value).toFixed(digits)}`;
