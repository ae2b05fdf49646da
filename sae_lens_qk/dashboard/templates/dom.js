// Elements, numbers and tokens. Text from data only ever becomes a text node or the value of a plain attribute.

/**
 * An element. `style` holds CSS properties, `on` listeners; false, null and undefined attributes and children are left out.
 */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (name === "style") for (const [property, v] of Object.entries(value)) node.style.setProperty(property, v);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

const link = (href, ...children) => el("a", { href }, ...children);
const hidden = (text) => el("span", { class: "hidden" }, text);

function section(title, ...children) {
  return el("section", {}, el("h2", {}, title), ...children);
}

/** A labelled <select>; options: [[value, text], ...]. */
function select(label, options, value, onChange) {
  const made = el("select", { on: { change: () => onChange(made.value) } });
  for (const [v, text] of options) made.append(el("option", { value: v, selected: String(v) === String(value) }, text));
  return el("label", { class: "field" }, el("span", {}, label), made);
}

/** Term and description, side by side: [[term, description, explanation], ...]. */
function facts(list) {
  const item = ([term, value, note]) =>
    el("div", {}, el("dt", {}, term), el("dd", {}, value), note && el("dd", { class: "note" }, note));
  return el("dl", { class: "facts" }, list.filter(Boolean).map(item));
}

const NOT_KNOWN = "–";
const threeDigits = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const fourDigits = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

function number(value) {
  if (value === null || value === undefined) return NOT_KNOWN;
  const size = Math.abs(value);
  if (size !== 0 && size < 1e-3) return value.toExponential(1).replace("-", "−").replace("e−", "e-");
  return (size >= 1000 ? whole : threeDigits).format(value).replace("-", "−");
}

function signed(value) {
  return value > 0 ? `+${number(value)}` : number(value);
}

function share(value) {
  if (value === null || value === undefined) return NOT_KNOWN;
  if (value !== 0 && Math.abs(value) < 1e-6) return `${(100 * value).toExponential(1)} %`;
  const nearAll = value > 0.99 && value < 1; // 99.93 %, not 99.9 %
  return `${(nearAll ? fourDigits : threeDigits).format(100 * value).replace("-", "−")} %`;
}

const plural = (n, one, many = `${one}s`) => `${whole.format(n)} ${n === 1 ? one : many}`;

const ofAll = (n, all) => `${whole.format(n)} of ${whole.format(all)}`;

// Tokens. Line ends, tabs, control and direction characters are made visible; a token that only is white space, too.
const VISIBLE = { "\n": "⏎", "\r": "␍", "\t": "⇥" };
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

function visible(word) {
  if (word === "") return "∅";
  return word.replace(UNSEEN, (c) => VISIBLE[c] ?? `U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}`);
}

/** A token on its own, as in a table: leading and trailing spaces shown as "␣". */
function standalone(word) {
  return visible(word).replace(/^ +| +$/g, (spaces) => "␣".repeat(spaces.length));
}

const chip = (word) => el("code", { class: "chip" }, standalone(word));

let announcements = 0;

/** Say something to screen readers. */
function announce(text) {
  const said = document.getElementById("announce");
  said.textContent = announcements++ % 2 ? text : `${text}\u00a0`; // a text that does not change is not read again
}
