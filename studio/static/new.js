// The form of a new run: the trainer is asked while one types, and settings can be searched.

const CHECK_AFTER = 500;
const form = document.getElementById("new");
const $ = (id) => document.getElementById(id);

// --- What the trainer thinks ---

let asking = null;
let timer = null;

function checkSoon() {
  clearTimeout(timer);
  timer = setTimeout(check, CHECK_AFTER);
}

async function check() {
  clearTimeout(timer);
  asking?.abort();
  if (!form.elements.dataset.value || !form.elements.base_model.value) return;
  asking = new AbortController();
  const panel = $("check");
  panel.classList.add("checking");
  panel.setAttribute("aria-busy", "true");
  try {
    const answer = await fetch("/new/check", { method: "POST", body: new URLSearchParams(new FormData(form)), signal: asking.signal });
    if (answer.ok) show(await answer.text());
  } catch (error) {
    if (error.name === "AbortError") return;
  }
  panel.classList.remove("checking");
  panel.removeAttribute("aria-busy");
}

function show(html) {
  const open = new Set([...$("check").querySelectorAll("details[open] > summary")].map((each) => each.textContent));
  const fresh = new DOMParser().parseFromString(html, "text/html");
  $("check").replaceChildren(...fresh.body.childNodes);
  for (const summary of $("check").querySelectorAll("summary")) summary.parentElement.open = open.has(summary.textContent);
  clearWrong();
  const problems = [...$("check").querySelectorAll("[data-field]")];
  for (const each of problems) setWrong(each.dataset.field, each.dataset.text);
}

function clearWrong() {
  for (const field of form.querySelectorAll(".field.wrong")) {
    field.classList.remove("wrong");
    field.querySelector("[aria-invalid]")?.removeAttribute("aria-invalid");
    const text = field.querySelector(".wrong-text");
    text.hidden = true;
    text.textContent = "";
  }
}

function setWrong(id, words) {
  const field = $(`${id}-field`);
  const text = $(`${id}-problem`);
  if (!field || !text) return;
  field.classList.add("wrong");
  $(id)?.setAttribute("aria-invalid", "true");
  text.textContent = text.hidden ? words : `${text.textContent} ${words}`;
  text.hidden = false;
  field.closest("details")?.setAttribute("open", "");
}

// --- Finding settings ---

const find = $("find");
const groups = [...document.querySelectorAll(".group")];
const opened = new Map();

function search() {
  const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const group of groups) {
    if (!opened.has(group)) opened.set(group, group.open);
    let inGroup = 0;
    for (const field of group.querySelectorAll(".field")) {
      field.hidden = !words.every((word) => field.dataset.search.includes(word));
      inGroup += !field.hidden;
    }
    group.hidden = !inGroup;
    group.open = words.length ? inGroup > 0 : opened.get(group);
    count += inGroup;
  }
  if (!words.length) opened.clear();
  $("found").hidden = !words.length;
  $("found").textContent = count ? `${count} ${count === 1 ? "setting" : "settings"} found` : "No setting is called so, here or in other trainers.";
}

// --- How many are not at their default ---

function isChanged(control) {
  if (control.type === "hidden" || control.type === "search") return false;
  if (control.type === "radio") return control.checked && !("default" in control.dataset);
  if (control.type === "checkbox") return control.checked !== "default" in control.dataset;
  if (control.tagName === "SELECT") return !("default" in control.selectedOptions[0].dataset);
  return control.value !== "" && control.value !== control.placeholder;
}

function count() {
  const changed = [...$("more").querySelectorAll("input, select, textarea")].filter(isChanged).length;
  $("changed").textContent = !changed ? "" : `${changed} ${changed === 1 ? "setting" : "settings"} changed`;
}

// --- A draft that outlives the page; configs hold no secrets ---

const key = form.getAttribute("data-key"); // form.dataset is the field of that name

function keep() {
  if (key) localStorage.setItem(key, JSON.stringify([...new FormData(form)]));
}

function restore() {
  const kept = key && !document.querySelector(".wrong") && localStorage.getItem(key);
  if (!kept) return;
  const entries = JSON.parse(kept);
  for (const control of form.elements) {
    const values = entries.filter(([name]) => name === control.name).map(([, text]) => text);
    if (!values.length || control.type === "hidden" || control.type === "submit") continue;
    const value = values.at(-1);
    if (control.type === "radio" || control.type === "checkbox") control.checked = values.includes(control.value);
    else if (control.tagName !== "SELECT" || [...control.options].some((each) => each.value === value)) control.value = value;
  }
}

// --- All together ---

form.addEventListener("input", (event) => {
  if (event.target === find) return;
  keep();
  count();
  checkSoon();
});
form.addEventListener("keydown", (event) => {
  // Enter in a field asks for a check; only the button starts a run.
  if (event.key !== "Enter" || !event.target.matches("input")) return;
  event.preventDefault();
  if (event.target !== find) check();
});
form.addEventListener("submit", (event) => {
  if (event.submitter?.id === "check-now") {
    event.preventDefault();
    check();
  } else if (key) localStorage.removeItem(key);
});
find.addEventListener("input", search);
$("preset").addEventListener("change", (event) => {
  location.href = `/new?preset=${encodeURIComponent(event.target.value)}`;
});

function focusOn(id) {
  const wanted = id && $(id);
  if (!wanted) return;
  wanted.closest("details")?.setAttribute("open", "");
  wanted.focus();
  wanted.scrollIntoView({ block: "center" });
}

// A link to a field that lies in a closed group opens it.
document.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#"]');
  if (!link || !$(link.hash.slice(1))) return;
  event.preventDefault();
  focusOn(link.hash.slice(1));
});

restore();
count();
focusOn(form.getAttribute("data-focus"));
if (!$("check").querySelector(".checks, .check-problems")) check();
