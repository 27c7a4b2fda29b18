// The longer tables of a report: filtered, sorted, fifty rows at a time; and how values are written.
"use strict";

// ---- values as people read them
const number = (digits) => new Intl.NumberFormat("en", { maximumSignificantDigits: digits });
const scaled = (value, unit) => {
  const names = ["", "k", "M", "G", "T"];
  let power = 0;
  while (Math.abs(value) >= 1000 && power < names.length - 1) { value /= 1000; power += 1; }
  return `${number(3).format(value)} ${names[power]}${unit}`;
};
const clock = (seconds) => {
  if (seconds < 60) return `${number(3).format(seconds)} s`;
  const whole = Math.round(seconds), pad = (n) => String(n).padStart(2, "0");
  const h = Math.floor(whole / 3600), m = Math.floor((whole % 3600) / 60);
  return h ? `${h}:${pad(m)}:${pad(whole % 60)} h` : `${m}:${pad(whole % 60)} min`;
};
const percent = (value) => `${number(3).format(100 * value)} %`;
const written = {
  text: String, name: String, choice: String, percent,
  number: (v) => new Intl.NumberFormat("en").format(v), real: (v) => number(4).format(v),
  bytes: (v) => scaled(v, "B"), seconds: clock,
};
const onTheRight = (kind) => !["text", "name", "choice"].includes(kind);

// ---- elements
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};

// ---- tables: filtered, sorted, fifty rows at a time
const ROWS = 50;
const labelled = (text, field) => make("label", {}, text, field);
function filters(table, changed) {
  const bar = make("div", { class: "filters" });
  const search = make("input", { type: "search", autocomplete: "off", spellcheck: "false" });
  search.addEventListener("input", changed);
  bar.append(labelled("Only rows with ", search));
  const choices = [];
  table.columns.forEach(([label, kind], place) => {
    const values = kind === "choice" ? [...new Set(table.rows.map((row) => row[place]))].sort() : [];
    if (values.length < 2) return;
    const select = make("select", {}, make("option", { value: "" }, "all"));
    for (const value of values) select.append(make("option", {}, value));
    select.addEventListener("change", changed);
    bar.append(labelled(`${label} `, select));
    choices.push([place, select]);
  });
  const passes = (row) => choices.every(([place, select]) => !select.value || row[place] === select.value)
    && row.some((cell) => String(cell ?? "").toLowerCase().includes(search.value.toLowerCase()));
  return [bar, passes];
}
function cell(value, kind, first) {
  const classes = onTheRight(kind) ? "right" : kind === "name" ? "name" : "";
  const text = value === null || value === "" ? "" : written[kind](value);
  return make(first ? "th" : "td", first ? { scope: "row", class: classes } : { class: classes }, text);
}
function show(host, table) {
  let page = 0, sorted = null, falling = false;
  const [bar, passes] = filters(table, () => { page = 0; draw(); });
  const body = make("tbody"), state = make("span", { role: "status" });
  const buttons = table.columns.map(([label, kind], place) => {
    const button = make("button", { type: "button" }, label);
    button.addEventListener("click", () => {
      falling = sorted === place ? !falling : onTheRight(kind);
      sorted = place; page = 0; draw();
    });
    return button;
  });
  const heads = buttons.map((button, place) => make("th", {
    scope: "col", class: onTheRight(table.columns[place][1]) ? "right" : "",
  }, button));
  const back = make("button", { type: "button" }, "Previous"), on = make("button", { type: "button" }, "Next");
  back.addEventListener("click", () => { page -= 1; draw(); });
  on.addEventListener("click", () => { page += 1; draw(); });
  function draw() {
    let rows = table.rows.filter(passes);
    if (sorted !== null) {
      const order = (a, b) => (a === null) - (b === null) || (falling ? -1 : 1) * (a < b ? -1 : a > b ? 1 : 0);
      rows = [...rows].sort((one, two) => order(one[sorted], two[sorted]));
    }
    const last = Math.max(0, Math.ceil(rows.length / ROWS) - 1);
    body.replaceChildren(...rows.slice(page * ROWS, (page + 1) * ROWS).map((row) =>
      make("tr", {}, ...row.map((value, n) => cell(value, table.columns[n][1], n === 0)))));
    heads.forEach((head, n) => head.setAttribute("aria-sort",
      n !== sorted ? "none" : falling ? "descending" : "ascending"));
    buttons.forEach((button, n) => { button.textContent = table.columns[n][0] + (n !== sorted ? "" : falling ? " ↓" : " ↑"); });
    state.textContent = rows.length > ROWS
      ? `${page * ROWS + 1} to ${Math.min(rows.length, (page + 1) * ROWS)} of ${written.number(rows.length)} rows`
      : `${rows.length} ${rows.length === 1 ? "row" : "rows"}`;
    back.hidden = on.hidden = rows.length <= ROWS;
    back.disabled = page === 0;
    on.disabled = page === last;
  }
  const pager = make("div", { class: "filters pager" }, back, on, state);
  const scroll = make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": host.dataset.label },
    make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body));
  if (table.rows.length > 8) host.append(bar);
  host.append(scroll, pager);
  draw();
}
