"use strict";
// Everything below needs this script, so it is hidden without it.
for (const part of document.querySelectorAll("[data-script]")) part.hidden = false;

const PAGE = 25;
const splits = JSON.parse(document.getElementById("data").textContent);
const make = (tag, text = "", name = "") => Object.assign(document.createElement(tag), { textContent: text, className: name });
const anchorOf = (split, id) => `q/${encodeURIComponent(split)}/${encodeURIComponent(id)}`;
const options = (select, labels) => labels.forEach((label, value) => select.append(new Option(label, value)));

// Tables sort by a click on a heading: numbers by their size, the largest first, and texts by the alphabet.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    if ("fixed" in heading.dataset) return;
    const button = make("button", heading.textContent);
    button.type = "button";
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const text = (row) => row.cells[column].textContent.trim();
      const number = (row) => parseFloat(text(row).replaceAll(",", "").replace("−", "-"));
      const rows = [...table.tBodies[0].rows];
      const numeric = rows.some((row) => !Number.isNaN(number(row)));
      const before = heading.getAttribute("aria-sort");
      const rising = before ? before === "descending" : !numeric;
      const value = (row) => (Number.isNaN(number(row)) ? (rising ? Infinity : -Infinity) : number(row));
      const compare = numeric ? (a, b) => value(a) - value(b) : (a, b) => text(a).localeCompare(text(b));
      rows.sort((a, b) => (rising ? compare(a, b) : compare(b, a)) || 0);
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
      table.tBodies[0].append(...rows);
    });
  });
}

// The slider of a split: show the kept patches and the answer at one selection ratio.
for (const slider of document.querySelectorAll("input[data-labels]")) {
  const section = slider.closest("[data-examples]");
  const labels = JSON.parse(slider.dataset.labels);
  const show = () => {
    const label = labels[Number(slider.value)];
    slider.closest(".control").querySelector("output").textContent = label;
    slider.setAttribute("aria-valuetext", "ratio " + label);
    for (const part of section.querySelectorAll("[data-ratio]")) {
      part.classList.toggle("off", part.dataset.ratio !== label);
    }
  };
  slider.addEventListener("input", show);
  show();
}
// Hide the overlays to see the plain frames.
for (const box of document.querySelectorAll("input[data-plain]")) {
  box.addEventListener("change", () => box.closest("[data-examples]").classList.toggle("plain", box.checked));
}

// The questions of a split: filters, the list of all questions, and its pages.
const browsers = new Map();
for (const data of splits) {
  const section = document.querySelector(`[data-examples="${CSS.escape(data.split)}"]`);
  const field = (name) => section.querySelector(`[name="${name}"]`);
  const tags = [...new Set(data.tag_sets.flat())].sort();
  options(field("tag"), tags);
  options(field("system"), data.systems);
  options(field("other"), data.systems);
  field("system").value = data.headline;
  const texts = data.texts.map((text) => text.toLowerCase());
  const numbers = new Map(data.id.map((id, number) => [id, number]));
  const articles = [...section.querySelectorAll("article")];
  let found = [];
  let page = 0;

  const matches = (number) => {
    const text = field("text").value.trim().toLowerCase();
    const tag = field("tag").value;
    const form = field("form").value;
    const verdict = field("verdict").value;
    const other = field("other").value;
    if (text && !texts[data.text[number]].includes(text) && !data.answers[data.answer[number]].includes(text)) return false;
    if (tag !== "" && !data.tag_sets[data.tags[number]].includes(tags[tag])) return false;
    if (form && data.form[number] !== form) return false;
    if (verdict && data.right[field("system").value][number] !== verdict) return false;
    return other === "" || data.right[other][number] === field("otherverdict").value;
  };
  const item = (number) => {
    const line = make("li");
    line.id = "list/" + anchorOf(data.split, data.id[number]);
    line.tabIndex = -1;
    const question = make("div", data.texts[data.text[number]] + " ");
    const link = make("a", "#", "link");
    link.href = "#" + anchorOf(data.split, data.id[number]);
    link.setAttribute("aria-label", "Link to this question");
    question.append(make("strong", data.answers[data.answer[number]]), " ", link);
    const given = make("div", "", "given");
    data.systems.forEach((system, row) => {
      const right = data.right[row][number] === "1";
      const one = make("span", system + ": ", "soft");
      one.append(make("span", (data.answers[data.given[row][number]] || "–") + (right ? " ✓" : " ✗"), right ? "right" : "wrong"));
      given.append(one);
    });
    line.append(question, given, make("div", `${data.clips[data.clip[number]]} · ${data.tag_sets[data.tags[number]].join(", ")}`, "tagline soft small"));
    return line;
  };
  const show = () => {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    section.querySelector(".questions").replaceChildren(...found.slice(page * PAGE, (page + 1) * PAGE).map(item));
    section.querySelector("[data-page]").textContent = `page ${page + 1} of ${pages.toLocaleString("en")}`;
    field("previous").disabled = page === 0;
    field("following").disabled = page === pages - 1;
  };
  const filter = () => {
    found = data.id.map((_, number) => number).filter(matches);
    page = 0;
    const shown = new Set(found);
    for (const article of articles) article.hidden = !shown.has(numbers.get(article.dataset.question));
    for (const heading of section.querySelectorAll("[data-kind]")) {
      let next = heading.nextElementSibling;
      while (next && next.matches("article") && next.hidden) next = next.nextElementSibling;
      heading.hidden = !(next && next.matches("article"));
    }
    const count = articles.filter((article) => !article.hidden).length;
    section.querySelector("[data-found]").textContent =
      `${found.length.toLocaleString("en")} of ${data.id.length.toLocaleString("en")} questions, ${count} of ${articles.length} examples above`;
    show();
  };
  const reset = () => {
    for (const control of section.querySelectorAll(".filters input, .filters select")) {
      control.value = { otherverdict: "0", system: data.headline }[control.name] ?? "";
    }
    filter();
  };
  for (const control of section.querySelectorAll(".filters input, .filters select")) control.addEventListener("input", filter);
  field("reset").addEventListener("click", reset);
  field("previous").addEventListener("click", () => { page -= 1; show(); });
  field("following").addEventListener("click", () => { page += 1; show(); });
  browsers.set(data.split, {
    section,
    // Show one question in the list, whatever the filters.
    open(id) {
      const number = numbers.get(id);
      if (number === undefined) return;
      if (!matches(number)) reset();
      page = Math.floor(found.indexOf(number) / PAGE);
      show();
      focusOn(document.getElementById("list/" + anchorOf(data.split, id)));
    },
    turn(by) {
      const before = page;
      page += by;
      show();
      return page !== before;
    },
    set(values) {
      for (const [name, value] of Object.entries(values)) field(name).value = value;
      filter();
    },
  });
  filter();
}

const focusOn = (element) => {
  if (!element) return;
  element.focus({ preventScroll: true });
  element.scrollIntoView({ block: "center" });
};
// A link to a question leads to its example, or else to its place in the list.
const follow = () => {
  const hash = location.hash.slice(1);
  if (!hash.startsWith("q/")) return;
  const article = document.getElementById(hash);
  if (article && !article.hidden) return focusOn(article);
  const [, split, id] = hash.split("/").map(decodeURIComponent);
  if (browsers.has(split)) browsers.get(split).open(id);
};
addEventListener("hashchange", follow);
follow();

// The arrow keys step through examples and listed questions, and turn the pages of the list.
addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step || event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  if (event.target.closest("input, select, textarea, .scroll")) return;
  const current = document.activeElement.closest("[data-examples] article, [data-examples] li");
  const section = current ? current.closest("[data-examples]") : document.querySelector("[data-examples]");
  const all = () => [...section.querySelectorAll("article, .questions li")].filter((one) => !one.hidden);
  const place = current ? all().indexOf(current) + step : 0;
  let next = all()[place];
  const browser = browsers.get(section.dataset.examples);
  if (place === all().length && browser && browser.turn(1)) next = section.querySelector(".questions li");
  if (current && step < 0 && current.matches("li:first-child") && browser && browser.turn(-1)) {
    next = section.querySelector(".questions li:last-child");
  }
  if (!next) return;
  event.preventDefault();
  focusOn(next);
  history.replaceState(null, "", "#" + next.querySelector(".link").getAttribute("href").slice(1));
});

// Two systems side by side.
const comparison = document.getElementById("comparison");
if (comparison) {
  const field = (name) => comparison.querySelector(`[name="${name}"]`);
  const signed = (value, digits) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
  options(field("split"), splits.map((data) => data.title));
  const compare = () => {
    const data = splits[field("split").value];
    const [first, second] = [Number(field("first").value), Number(field("second").value)];
    const target = document.getElementById("compared");
    if (first === second) return target.replaceChildren(make("p", "Choose two different systems.", "soft"));
    const pair = data.pairs.find((one) => one.first === Math.min(first, second) && one.second === Math.max(first, second));
    const turned = first > second;
    const lines = make("ul");
    for (const column of ["all", "open", "binary"].filter((name) => pair[name])) {
      let [mean, low, high, verdict] = pair[column];
      if (turned) {
        [mean, low, high] = [-mean, -high, -low];
        verdict = { above: "below", below: "above" }[verdict] || verdict;
      }
      const line = make("li");
      line.append(
        make("b", `${signed(mean, 2)} points`),
        ` on ${column} questions, 95% interval ${signed(low, 1)} to ${signed(high, 1)}: ` +
          (verdict === "cannot be told apart" ? "they cannot be told apart" : `${data.systems[first]} is ${verdict}`),
      );
      lines.append(line);
    }
    const counts = { 11: 0, 10: 0, "01": 0, "00": 0 };
    data.id.forEach((_, number) => { counts[data.right[first][number] + data.right[second][number]] += 1; });
    const table = make("table");
    const body = table.createTBody();
    const cell = (kind, label, verdicts) => {
      const row = body.insertRow();
      row.insertCell().textContent = label;
      row.insertCell().textContent = counts[kind].toLocaleString("en");
      const show = make("button", "show");
      show.type = "button";
      show.addEventListener("click", () => {
        const browser = browsers.get(data.split);
        browser.set({ text: "", tag: "", form: "", system: first, verdict: verdicts[0], other: second, otherverdict: verdicts[1] });
        browser.section.scrollIntoView();
      });
      row.insertCell().append(show);
    };
    cell("11", "both right", "11");
    cell("10", `only ${data.systems[first]} right`, "10");
    cell("01", `only ${data.systems[second]} right`, "01");
    cell("00", "both wrong", "00");
    const scroll = make("div", "", "scroll narrow");
    scroll.append(table);
    target.replaceChildren(lines, scroll);
  };
  const fill = () => {
    const data = splits[field("split").value];
    for (const name of ["first", "second"]) {
      field(name).replaceChildren();
      options(field(name), data.systems);
    }
    field("first").value = data.headline;
    field("second").value = data.headline ? data.headline - 1 : data.systems.length - 1;
    compare();
  };
  field("split").addEventListener("input", fill);
  for (const name of ["first", "second"]) field(name).addEventListener("input", compare);
  fill();
}
