// Tables that sort and page.

const PAGE_SIZE = 25;

/**
 * A table over rows of any kind.
 *
 * columns: [{name, cell: row => node or text, value: row => what it sorts by (absent: does not sort), numeric, note}]
 * order: {column: number, descending}: how the rows are sorted already (absent: in no order of a column).
 */
function table({ caption, columns, rows, order = null, pageSize = PAGE_SIZE, empty = "None." }) {
  if (!rows.length) return el("p", { class: "empty" }, empty);
  const state = { rows, order, page: 0 };
  const title = el("caption", {}, caption);
  const body = el("tbody");
  const headings = columns.map((column, at) => heading(column, () => sortBy(at)));
  const count = el("span", { class: "count" });
  const [back, on] = [
    ["Previous", -1],
    ["Next", 1],
  ].map(([text, step]) => el("button", { type: "button", on: { click: () => turn(step) } }, text));
  const lastPage = Math.ceil(rows.length / pageSize) - 1;

  function sortBy(at) {
    const { value, numeric } = columns[at];
    const descending = state.order?.column === at ? !state.order.descending : Boolean(numeric);
    state.rows = sorted(state.rows, value, descending);
    state.order = { column: at, descending };
    state.page = 0;
    draw();
    announce(`Sorted by ${columns[at].name}, ${descending ? "descending" : "ascending"}.`);
  }

  function turn(step) {
    state.page = Math.min(Math.max(state.page + step, 0), lastPage);
    draw();
    announce(count.textContent);
  }

  function draw() {
    const first = state.page * pageSize;
    const shown = state.rows.slice(first, first + pageSize);
    body.replaceChildren(
      ...shown.map((row) =>
        el(
          "tr",
          {},
          columns.map((c, at) => el(at ? "td" : "th", { class: c.numeric && "number", scope: !at && "row" }, c.cell(row))),
        ),
      ),
    );
    count.textContent = `${whole.format(first + 1)}–${whole.format(first + shown.length)} of ${whole.format(rows.length)}`;
    back.toggleAttribute("disabled", state.page === 0);
    on.toggleAttribute("disabled", state.page === lastPage);
    headings.forEach((node, at) => {
      const sort = state.order?.column === at && (state.order.descending ? "descending" : "ascending");
      if (sort) node.setAttribute("aria-sort", sort);
      else node.removeAttribute("aria-sort");
    });
  }

  draw();
  return el(
    "div",
    { class: "table" },
    el("div", { class: "scroll" }, el("table", {}, title, el("thead", {}, el("tr", {}, headings)), body)),
    lastPage > 0 &&
      el("div", { class: "pager", role: "group", "aria-label": `Pages of: ${title.textContent}` }, count, back, on),
  );
}

function heading({ name, value, numeric, note }, onClick) {
  const content = value ? el("button", { type: "button", on: { click: onClick } }, name) : name;
  return el("th", { scope: "col", class: numeric && "number", title: note }, content);
}

/** A sorted copy; what is not known comes last either way. */
function sorted(rows, value, descending) {
  const known = (row) => value(row) !== null && value(row) !== undefined;
  const compare = (a, b) => (typeof a === "string" ? a.localeCompare(b) : a - b);
  const made = rows.filter(known).sort((a, b) => (descending ? compare(value(b), value(a)) : compare(value(a), value(b))));
  return made.concat(rows.filter((row) => !known(row)));
}

/** A table of plain rows, numbers and texts. */
function plainTable(caption, names, rows, { sorts = false } = {}) {
  const columns = names.map((name, at) => {
    const numeric = at > 0 && rows.every((row) => typeof row[at] !== "string");
    const cell = (row) => (typeof row[at] === "number" || row[at] === null ? number(row[at]) : String(row[at]));
    return { name, numeric, cell, value: sorts ? (row) => row[at] : undefined };
  });
  return table({ caption, columns, rows });
}
