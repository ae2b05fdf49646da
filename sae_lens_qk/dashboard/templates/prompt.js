// One prompt: the patterns of a head side by side, and the pairs behind one of its attention weights.

const PATTERNS = [
  ["true", "Model", "what the head does"],
  ["rebuilt", "Rebuilt", "from the dictionary's features"],
  ["difference", "Rebuilt minus model", "blue: too much; orange: too little"],
];
const LEVELS = [0, 0.01, 0.05, 0.2, 0.5, 1];
const SOURCES = [
  ["feature_map", "feature map"],
  ["transcoders", "transcoders"],
];

/** Depth of colour of an attention weight or a difference of two. */
const level = (value) => Math.abs(value) ** 0.6;

/** How many patterns stand side by side, so that cells are large enough. */
const columnsFor = (nTokens) => (nTokens <= 36 ? 3 : nTokens <= 56 ? 2 : 1);

/** Whether a query of a prompt may attend to a key. */
const isAllowed = (prompt, i, j) => j <= i && j >= prompt.first_keys[i];

/** Place of (query, key) in a pattern, the allowed keys of each query in turn. */
function placeOf(prompt, i, j) {
  prompt.starts ??= rowStarts(prompt.first_keys);
  return prompt.starts[i] + j - prompt.first_keys[i];
}

function rowStarts(firstKeys) {
  let next = 0;
  return firstKeys.map((first, i) => {
    const start = next;
    next += i - first + 1;
    return start;
  });
}

const quoted = (word, pos) => `"${visible(word)}" (${pos})`;

/** The attention weight that a prompt opens with: the first one that is explained, if any is. */
function firstCell(prompt) {
  const i = prompt.words.length - 1;
  const [cell = `0/${i}/${prompt.first_keys[i]}`] = Object.keys(prompt.explanations);
  const [head, query, key] = cell.split("/").map(Number);
  return { head, i: query, j: key };
}

function promptView(number, wanted) {
  const prompt = data("prompts")[number];
  const state = { source: "feature_map", ...firstCell(prompt), ...wanted };
  const text = el("div", { class: "prompt-text" });
  const pairs = el("section", { class: "cell-pairs", "aria-live": "off" });
  const readout = el("p", { class: "readout", "aria-hidden": "true" });
  const grids = PATTERNS.map(([kind, title, note]) => patternGrid(prompt, kind, title, note, choose, point));

  const valuesAt = (i, j) => {
    const at = placeOf(prompt, i, j);
    const [real, rebuilt] = [prompt.true[state.head][at], prompt.rebuilt[state.source][state.head][at]];
    return { true: real, rebuilt, difference: rebuilt - real };
  };
  const describe = (i, j) => {
    const { true: real, rebuilt } = valuesAt(i, j);
    const place = `head ${state.head}, query ${quoted(prompt.words[i], i)}, key ${quoted(prompt.words[j], j)}`;
    return `${place}: true ${real.toFixed(2)}, rebuilt ${rebuilt.toFixed(2)}`;
  };

  function point(i, j) {
    readout.textContent = describe(i, j);
    for (const grid of grids) grid.point(i, j);
  }
  function choose(i, j) {
    Object.assign(state, { i, j });
    history.replaceState(null, "", cellHref(number, state.head, i, j));
    drawCell();
    announce(`${describe(i, j)}. Its pairs are listed below the patterns.`);
  }
  function chooseHead(head) {
    state.head = head;
    history.pushState(null, "", cellHref(number, head, state.i, state.j));
    draw();
  }
  function draw() {
    for (const grid of grids) grid.fill(valuesAt, describe, `head ${state.head}`);
    drawCell();
  }
  function drawCell() {
    const { i, j } = state;
    for (const grid of grids) grid.select(i, j);
    point(i, j);
    text.replaceChildren(promptText(prompt.words, i, j));
    pairs.replaceChildren(...cellView(prompt, state, valuesAt(i, j)).flat(Infinity).filter(Boolean));
  }

  draw();
  const count = data("prompts").length;
  const columns = columnsFor(prompt.words.length);
  const onSource = (source) => {
    state.source = source;
    draw();
  };
  return {
    title: `Prompt ${number + 1}`,
    nodes: [
      el("div", { class: "title" }, el("h1", {}, `Prompt ${number + 1}`), count > 1 && promptLinks(number)),
      text,
      el(
        "div",
        { class: "toolbar" },
        headPicker(prompt, state.head, chooseHead),
        select("Rebuilt from", SOURCES, state.source, onSource),
        el("p", { class: "hint" }, "A click on a cell, or arrow keys and Enter, lists the pairs behind it below."),
      ),
      el(
        "div",
        { class: "patterns", "data-columns": columns, style: { "--tokens": prompt.words.length, "--columns": columns } },
        grids.map((grid) => grid.node),
      ),
      legend(),
      readout,
      explainedLinks(number, prompt),
      pairs,
    ],
  };
}

function promptLinks(current) {
  const item = (prompt, number) =>
    el(
      "li",
      {},
      el("a", { href: `#/prompt/${number}`, "aria-current": number === current && "true" }, `Prompt ${number + 1}`),
    );
  return el("nav", { class: "pills", "aria-label": "Prompts" }, el("ul", {}, data("prompts").map(item)));
}

function promptText(words, i, j) {
  const mark = (pos) => {
    if (pos === i) return { class: pos === j ? "at-query at-key" : "at-query", name: pos === j ? "query and key" : "query" };
    return pos === j ? { class: "at-key", name: "key" } : undefined;
  };
  return el(
    "p",
    { class: "passage" },
    words.map((word, pos) => token(word, mark(pos))),
  );
}

/** Radio buttons with small pictures of the heads' patterns. */
function headPicker(prompt, chosen, onChange) {
  const option = (pattern, head) => {
    const input = el("input", {
      type: "radio",
      name: "head",
      value: head,
      checked: head === chosen,
      on: { change: () => onChange(head) },
    });
    return el("label", {}, input, thumbnail(prompt, pattern), el("span", {}, hidden("Head "), String(head)));
  };
  return el("fieldset", { class: "heads" }, el("legend", {}, "Head"), prompt.true.map(option));
}

/** A small picture of a pattern, painted again in the colour of another theme. */
function thumbnail(prompt, pattern) {
  const size = prompt.words.length;
  const canvas = el("canvas", { width: size, height: size, "aria-hidden": "true" });
  canvas.paint = () => {
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, size, size);
    context.fillStyle = getComputedStyle(canvas).color;
    for (let i = 0; i < size; i++) {
      for (let j = prompt.first_keys[i]; j <= i; j++) {
        context.globalAlpha = Math.min(level(pattern[placeOf(prompt, i, j)]), 1);
        context.fillRect(j, i, 1, 1);
      }
    }
  };
  return canvas;
}

/** Cells of the allowed keys, one per (query, key), in which arrow keys move. */
function patternGrid(prompt, kind, title, note, onChoose, onPoint) {
  const { words, first_keys: first } = prompt;
  const cells = words.map((_, i) =>
    words.slice(first[i], i + 1).map((_, n) => {
      const j = first[i] + n;
      const style = n === 0 && j > 0 ? { "grid-column": j + 2 } : {}; // behind the heading and keys out of reach
      return el("div", { role: "gridcell", class: "cell", tabindex: "-1", "data-i": i, "data-j": j, style });
    }),
  );
  const cellAt = (i, j) => cells[i][j - first[i]];
  const heading = (word, role) => el("div", { role, class: role }, el("span", {}, standalone(word)));
  const rows = words.map((word, i) => el("div", { role: "row" }, heading(word, "rowheader"), cells[i]));
  const corner = el("div", { role: "columnheader", class: "corner" }, hidden("query"));
  const top = el(
    "div",
    { role: "row" },
    corner,
    words.map((word) => heading(word, "columnheader")),
  );
  const grid = el(
    "div",
    { class: "grid", role: "grid", on: { keydown, click, pointerover: (event) => at(event, onPoint) } },
    top,
    rows,
  );
  let [focus, chosen, pointed] = [cells[0][0], null, null];

  function at(event, act) {
    const { i, j } = event.target.dataset ?? {};
    if (i !== undefined) act(Number(i), Number(j));
  }
  function click(event) {
    at(event, (i, j) => {
      moveTo(i, j);
      onChoose(i, j);
    });
  }
  function keydown(event) {
    const [i, j] = [Number(focus.dataset.i), Number(focus.dataset.j)];
    const last = words.length - 1;
    const all = event.ctrlKey;
    const down = Math.min(i + 1, last);
    const moves = {
      ArrowUp: [Math.max(i - 1, j), j],
      ArrowDown: [isAllowed(prompt, down, j) ? down : i, j],
      ArrowLeft: [i, Math.max(j - 1, first[i])],
      ArrowRight: [i, Math.min(j + 1, i)],
      Home: all ? [0, 0] : [i, first[i]],
      End: all ? [last, last] : [i, i],
    };
    if (event.key in moves) moveTo(...moves[event.key]);
    else if (event.key === "Enter" || event.key === " ") onChoose(i, j);
    else return;
    event.preventDefault();
  }
  /** One cell of a grid is in the tab order; arrow keys say which. */
  function stop(cell) {
    focus.tabIndex = -1;
    focus = cell;
    focus.tabIndex = 0;
  }
  function moveTo(i, j) {
    stop(cellAt(i, j));
    focus.focus();
    onPoint(i, j);
  }

  return {
    node: el(
      "figure",
      { class: `pattern ${kind}` },
      el("figcaption", {}, el("strong", {}, title), " ", el("span", {}, note)),
      el("div", { class: "scroll" }, grid),
    ),
    fill(valuesAt, describe, head) {
      grid.setAttribute("aria-label", `${title}, ${head}: queries down, keys across`);
      for (const cell of cells.flat()) {
        const [i, j] = [Number(cell.dataset.i), Number(cell.dataset.j)];
        const value = valuesAt(i, j)[kind];
        cell.style.setProperty("--level", Math.min(level(value), 1).toFixed(3));
        cell.classList.toggle("negative", value < 0);
        cell.setAttribute("aria-label", describe(i, j));
      }
    },
    select(i, j) {
      chosen?.removeAttribute("aria-selected");
      chosen = cellAt(i, j);
      chosen.setAttribute("aria-selected", "true");
      stop(chosen);
    },
    point(i, j) {
      pointed?.classList.remove("pointed");
      pointed = cellAt(i, j);
      pointed.classList.add("pointed");
    },
  };
}

function legend() {
  const swatch = (value, sign) =>
    el(
      "span",
      { class: "swatch" },
      el("span", { class: `cell ${sign}`, style: { "--level": level(value).toFixed(3) } }),
      String(value),
    );
  const scale = (text, sign, values) =>
    el(
      "span",
      { class: "scale" },
      text,
      values.map((value) => swatch(value, sign)),
    );
  return el(
    "p",
    { class: "legend" },
    scale("weight, or too much", "", LEVELS),
    scale("too little", "negative", LEVELS.slice(1)),
  );
}
