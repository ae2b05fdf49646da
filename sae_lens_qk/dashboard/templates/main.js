// Routes, theme and search box.

// A path and its view; no view where what it names is not in this file.
const ROUTES = [
  [/^\/?$/, () => overviewView()],
  [/^\/prompt\/(\d+)(?:\/(\d+)(?:\/(\d+)\/(\d+))?)?$/, (prompt, head, i, j) => promptRoute(prompt, { head, i, j })],
  [/^\/features\/(query|key)$/, (side) => featuresView(side)],
  [/^\/feature\/(query|key)\/(\d+)$/, (side, n) => hasPage(side, n) && featureView(side, n)],
  [/^\/pairs(?:\/(\d+))?$/, (head) => (head ?? 0) < overview.n_heads && pairsView(head)],
  [/^\/pair\/(\d+)$/, (n) => pairPlaces().has(n) && pairView(n)],
  [/^\/heads$/, () => headsView()],
];

function promptRoute(at, wanted) {
  const prompt = data("prompts")[at];
  if (!prompt) return null;
  const given = Object.fromEntries(Object.entries(wanted).filter(([, value]) => value !== undefined));
  const { head = 0, i = 0, j = prompt.first_keys[i] } = given;
  return head < overview.n_heads && i < prompt.words.length && isAllowed(prompt, i, j) && promptView(at, given);
}

function notFound(path) {
  const leftOut = /^\/(feature|pair)\//.test(path);
  const why = leftOut
    ? "It may have been left out of this file; the overview says how much it holds."
    : "The address has no view.";
  return {
    title: "Not here",
    nodes: [el("h1", {}, "Not here"), el("p", {}, why), el("p", {}, link("#/", "To the overview"))],
  };
}

const asNumber = (part) => (/^\d+$/.test(part) ? Number(part) : part);

function viewOf(path) {
  if (path.startsWith("/search/")) return searchView(path.slice("/search/".length));
  for (const [pattern, make] of ROUTES) {
    const found = path.match(pattern);
    const view = found && make(...found.slice(1).map(asNumber));
    if (view) return view;
  }
  return notFound(path);
}

function currentPath() {
  try {
    return decodeURIComponent(location.hash.slice(1));
  } catch {
    return location.hash.slice(1); // a "%" that somebody typed
  }
}

const content = document.getElementById("content");
const theSearch = document.getElementById("search");
const searchText = document.getElementById("search-text");

function show({ moveFocus }) {
  const path = currentPath();
  const view = viewOf(path);
  document.title = path.length > 1 ? `${view.title} – ${overview.title}` : overview.title;
  content.replaceChildren(...view.nodes.filter(Boolean));
  for (const node of document.querySelectorAll("[data-nav]")) markCurrent(node, path);
  if (!path.startsWith("/search/")) searchText.value = "";
  repaint();
  if (moveFocus) {
    const heading = content.querySelector("h1");
    heading.tabIndex = -1;
    heading.focus({ preventScroll: true });
    scrollTo(0, 0);
  }
}

/** Mark the menu entry under which a path lies. */
function markCurrent(node, path) {
  const [, menu, side] = node.getAttribute("href").slice(1).split("/");
  const [, place, ofSide] = path.split("/");
  const same =
    (place ?? "").replace(/s$/, "") === menu.replace(/s$/, "") && (!menu.startsWith("feature") || side === ofSide);
  if (same) node.setAttribute("aria-current", "page");
  else node.removeAttribute("aria-current");
}

theSearch.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = searchText.value;
  if (text.trim()) location.hash = `#/search/${encodeURIComponent(text)}`;
});

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address is the view's
  content.focus();
});

// Theme: as the system has it, or chosen and remembered where the browser remembers anything for files.

const THEMES = ["system", "light", "dark"];
const THEME_KEY = "sae-lens-qk-theme";
const themeButton = document.getElementById("theme");

function remembered() {
  try {
    return localStorage.getItem(THEME_KEY);
  } catch {
    return null;
  }
}

/** Pictures that the style sheet does not colour. */
function repaint() {
  for (const canvas of content.querySelectorAll("canvas")) canvas.paint();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  themeButton.textContent = `Theme: ${theme}`;
  try {
    localStorage.setItem(THEME_KEY, theme);
  } catch {
    // it holds until the file is closed
  }
  repaint();
}

themeButton.addEventListener("click", () => {
  const at = THEMES.indexOf(document.documentElement.dataset.theme);
  setTheme(THEMES[(at + 1) % THEMES.length]);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);

addEventListener("hashchange", () => show({ moveFocus: true }));
setTheme(THEMES.includes(remembered()) ? remembered() : "system");
show({ moveFocus: false });
