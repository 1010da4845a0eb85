// One run: the stream moves the chart and the messages; all else the server renders anew.

import { Chart } from "./chart.js";
import { listen, refresher, showInTab } from "./live.js";
import { opensFrom, rowsOfTable } from "./viewer.js";

const MOST_MESSAGES = 1_000;
const QUIET = new Set(["progress", "sample", "start"]);
const QUIET_TOPICS = new Set(["phase", "memory"]);
const KINDS = { warning: "warn", error: "bad", complete: "good", interrupted: "warn" };
const ENDS = new Set(["completed", "stopped", "failed", "cancelled"]);
const SYMBOLS = { warn: "warning", bad: "failed", good: "completed" };

const $ = (id) => document.getElementById(id);
const main = $("main");
const { job, name, after } = main.dataset;
const page = `/runs/${job}`;

// --- Parts that the server renders ---

const refreshState = refresher(`${page}/part/state`, 1_000);
const refreshFilm = refresher(`${page}/part/film`, 500);
const refreshFiles = refresher(`${page}/part/files`, 500);

// --- The newest picture, large, and the way back through the earlier ones ---

const film = () => $("film");
const rows = () => (film() ? rowsOfTable(film()) : []);
let shown = null; // what someone chose to look at; null follows the newest
let row = 0;

function showHero() {
  const links = rows()[row] ?? rows()[0] ?? [];
  if (!links.length) return;
  const at = shown === null ? links.length - 1 : Math.min(shown, links.length - 1);
  const link = links[at];
  const picture = $("hero-picture");
  if (picture.getAttribute("src") !== link.getAttribute("href")) picture.src = link.getAttribute("href");
  picture.alt = link.querySelector("img").alt;
  $("hero-link").href = link.href;
  $("hero-link").hidden = false;
  $("hero-link").closest("figure").hidden = false;
  $("hero-waiting")?.remove();
  $("hero-told").textContent = link.dataset.told;
  $("hero-tools").hidden = links.length < 2;
  Object.assign($("hero-step"), { max: links.length - 1, value: at });
  $("hero-step").setAttribute("aria-valuetext", link.dataset.told);
}

function choose(at) {
  const last = (rows()[row] ?? []).length - 1;
  shown = at >= last ? null : Math.max(0, at);
  showHero();
}

function setUpHero() {
  if (!$("hero-step")) return;
  $("hero-step").addEventListener("input", (event) => choose(+event.target.value));
  $("hero-earlier").addEventListener("click", () => choose(+$("hero-step").value - 1));
  $("hero-later").addEventListener("click", () => choose(+$("hero-step").value + 1));
  opensFrom($("film-frame"), rows);
  $("hero-link").addEventListener("click", (event) => {
    const link = (rows()[row] ?? [])[+$("hero-step").value];
    if (!link || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    link.click();
  });
  const frame = $("film-frame");
  let atEnd = true;
  frame.addEventListener("scroll", () => (atEnd = frame.scrollLeft + frame.clientWidth > frame.scrollWidth - 48));
  const follow = () => {
    $("previews").hidden = !rows().length;
    if (atEnd) frame.scrollLeft = frame.scrollWidth;
    showHero();
  };
  new MutationObserver(follow).observe(frame, { childList: true });
  follow();
}

// --- The chart ---

function setUpChart() {
  if (!$("chart")) return null;
  const controls = { series: $("series"), smooth: $("smooth"), logarithmic: $("logarithmic"), clip: $("clip") };
  $("chart-tools").hidden = false;
  const chart = new Chart($("chart"), controls);
  chart.checkpoints = $("chart").dataset.checkpoints.split(" ").filter(Boolean).map(Number);
  chart.load(`/jobs/${job}/metrics?points=800`);
  return chart;
}

// --- Messages ---

const list = $("messages");
const log = list.parentElement; // what scrolls

function remember(line) {
  if (QUIET.has(line.type) || QUIET_TOPICS.has(line.topic)) return;
  $("no-messages")?.remove();
  const atEnd = log.scrollTop + log.clientHeight > log.scrollHeight - 24;
  const item = document.createElement("li");
  const kind = KINDS[line.type] ?? "";
  item.className = kind;
  const time = document.createElement("time");
  const said = new Date(line.timestamp ?? Date.now());
  time.dateTime = said.toISOString();
  time.textContent = said.toTimeString().slice(0, 5);
  const text = document.createElement("span");
  text.textContent = line.message ?? line.type;
  item.append(time, symbol(SYMBOLS[kind] ?? "info"), text);
  list.append(item);
  while (list.children.length > MOST_MESSAGES) list.firstElementChild.remove();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function symbol(name) {
  const space = "http://www.w3.org/2000/svg";
  const drawn = document.createElementNS(space, "svg");
  drawn.setAttribute("class", "symbol");
  drawn.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `/static/symbols.svg#${name}`);
  drawn.append(use);
  return drawn;
}

// --- The log, while someone has it open ---

function setUpLog() {
  const details = $("log-details");
  const text = $("log-text");
  let timer = null;
  async function read() {
    const answer = await fetch(`/jobs/${job}/log`).catch(() => null);
    if (answer?.ok) {
      const said = (await answer.json()).text;
      const atEnd = text.scrollTop + text.clientHeight > text.scrollHeight - 24;
      if (said.trim() && said !== text.textContent) text.textContent = said;
      if (atEnd) text.scrollTop = text.scrollHeight;
    }
    if (details.open && !document.hidden && !("final" in main.dataset)) timer = setTimeout(read, 3_000);
  }
  details.addEventListener("toggle", () => {
    clearTimeout(timer);
    if (details.open) read();
  });
}

// --- What is said aloud: every tenth of the way, and when the state changes ---

let said = `${$("state").dataset.state} ${tenth($("state").dataset.percent || null)}`;

function tenth(percent) {
  return percent === null ? "" : Math.floor(percent / 10) * 10;
}

function speak(brief) {
  const about = `${brief.state} ${brief.state === "running" ? tenth(brief.percent) : ""}`.trim();
  if (about === said) return;
  said = about;
  const percent = brief.state === "running" && brief.percent !== null ? `, ${tenth(brief.percent)} percent` : "";
  $("spoken").textContent = `${brief.name}: ${brief.state}${percent}`;
}

// --- A word when it is over, for those who ask for it ---

const notify = $("notify");
let wanted = false;

function setUpNotice() {
  if (!notify || !("Notification" in window) || Notification.permission === "denied") return;
  notify.hidden = false;
  notify.addEventListener("click", async () => {
    wanted = (await Notification.requestPermission()) === "granted";
    notify.textContent = wanted ? "You will be told when it ends" : "This browser does not allow it";
    notify.disabled = true;
  });
}

function tellEnd(brief) {
  if (!ENDS.has(brief.state)) return;
  if (wanted) new Notification(`${brief.name}: ${brief.state}`, { icon: "/static/icon.svg" });
  wanted = false;
  if (notify) notify.hidden = true;
}

function takeState(brief) {
  if (brief.job_id !== job) return;
  tellEnd(brief);
  refreshState();
  speak(brief);
  showInTab(name, brief.state === "running" ? brief.percent : null);
}

// --- All together ---

setUpHero();
const chart = setUpChart();
setUpLog();
setUpNotice();
log.scrollTop = log.scrollHeight;

function takeLine(line) {
  remember(line);
  if (line.type === "progress" || line.type === "validation") chart?.add(line);
  if (line.type === "start") chart?.load(`/jobs/${job}/metrics?points=800`);
  if (line.type === "start" || line.type === "sample") refreshFilm();
  if (line.type === "checkpoint" || line.type === "complete") refreshFiles();
  if (line.type === "checkpoint") chart?.checkpoints.push(line.step);
}

if (!("final" in main.dataset)) {
  listen(job, after, {
    snapshot: (data) => data.job && takeState(data.job),
    trainer: takeLine,
    state: takeState,
    end: () => [refreshState, refreshFilm, refreshFiles].forEach((refresh) => refresh()),
  });
}
