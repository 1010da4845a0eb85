// A dataset: pictures come in by drag or button, captions save themselves as they are written.

import { listen } from "./live.js";

const main = document.getElementById("main");
const api = main.dataset.api;
const endings = main.dataset.endings.split(",");
const AT_ONCE = 3;
const PAUSE = 600; // ms without a key before a caption is saved
const THRICE = [1_000, 4_000]; // ms before an upload that met no answer is tried again

const byId = (id) => document.getElementById(id);
const stem = (name) => name.replace(/\.[^.]*$/, "").normalize("NFC");
const pathOf = (kind, name) => `${api}/${kind}/${encodeURIComponent(name)}`;

function size(bytes) {
  return bytes >= 1e6 ? `${(bytes / 1e6).toFixed(1)} MB` : `${Math.ceil(bytes / 1e3)} KB`;
}

// What the server says is wrong, with what helps.
async function refusal(answer) {
  try {
    const { detail, problems } = await answer.json();
    const hint = problems?.[0]?.hint ?? "";
    return detail.includes(hint) ? detail : `${detail.replace(/\.?$/, ".")} ${hint}`;
  } catch {
    return `The studio answered ${answer.status}.`;
  }
}

// --- Uploads ---

const uploads = { waiting: [], running: 0, done: 0, failed: [], texts: [], bytes: 0, sent: 0 };

function take(files) {
  for (const file of files) {
    const known = endings.some((ending) => file.name.toLowerCase().endsWith(ending));
    if (/\.txt$/i.test(file.name)) uploads.texts.push(file);
    else if (known) queue({ file, sent: 0 });
    else fail({ file, sent: 0 }, `Only ${endings.join(" ")} are taken.`, false);
  }
  pump();
}

function queue(upload) {
  if (upload.file.size > Number(main.dataset.most)) {
    fail(upload, `It has ${size(upload.file.size)}; at most ${size(Number(main.dataset.most))} are taken.`, false);
    return;
  }
  uploads.bytes += upload.file.size;
  uploads.waiting.push(upload);
}

function pump() {
  while (uploads.running < AT_ONCE && uploads.waiting.length) {
    uploads.running += 1;
    send(uploads.waiting.shift()).finally(() => {
      uploads.running -= 1;
      pump();
    });
  }
  if (!uploads.running && !uploads.waiting.length) finish();
  showUploads();
}

async function send(upload) {
  for (const pause of [...THRICE, null]) {
    const { status, text } = await put(upload);
    if (status === 200 || status === 201) {
      uploads.done += 1;
      return;
    }
    if (status || pause === null) {
      const answer = new Response(text, { status: status || 503 });
      fail(upload, status ? await refusal(answer) : "There was no connection to the studio.", true);
      return;
    }
    await new Promise((go) => setTimeout(go, pause));
  }
}

// fetch cannot tell how much of a body is sent.
function put(upload) {
  return new Promise((answer) => {
    const request = new XMLHttpRequest();
    request.open("PUT", pathOf("images", upload.file.name));
    request.setRequestHeader("Accept", "application/json");
    request.upload.onprogress = (event) => progress(upload, event.loaded);
    request.onloadend = () => answer({ status: request.status, text: request.responseText });
    request.send(upload.file);
  });
}

function progress(upload, sent) {
  uploads.sent += sent - upload.sent;
  upload.sent = sent;
  showUploads();
}

function fail(upload, why, again) {
  progress(upload, 0);
  const row = document.createElement("li");
  const name = document.createElement("b");
  name.textContent = upload.file.name;
  const told = document.createElement("span");
  told.textContent = why.replace(`${upload.file.name}: `, "");
  row.append(name, told);
  byId("upload-list").append(row);
  uploads.failed.push({ upload, row, again });
}

function retry() {
  const again = uploads.failed.filter((each) => each.again);
  uploads.failed = uploads.failed.filter((each) => !each.again);
  for (const { upload, row } of again) {
    row.remove();
    uploads.bytes -= upload.file.size;
    queue(upload);
  }
  pump();
}

// Texts beside pictures become captions, where there is none yet.
async function finish() {
  const texts = uploads.texts.splice(0);
  if (texts.length) await sendTexts(texts);
  if (!uploads.running && uploads.done) await refresh();
  showUploads();
}

async function sendTexts(texts) {
  const pictures = new Map();
  for (let offset = 0; offset !== null; ) {
    const part = await (await fetch(`${api}?offset=${offset}&limit=1000`)).json();
    for (const image of part.images) pictures.set(stem(image.name), image.name);
    offset = part.next;
  }
  for (const file of texts) {
    const picture = pictures.get(stem(file.name));
    const why = picture ? await sendText(picture, file) : "There is no picture of this name.";
    if (why) fail({ file, sent: 0 }, why, false);
    else uploads.done += 1;
  }
}

async function sendText(picture, file) {
  if (file.size > Number(main.dataset.mostText)) return "It is too large for a caption.";
  const answer = await write(picture, await file.text(), { "If-None-Match": "*" });
  if (answer.status === 412) return "This picture has a caption already; it stays.";
  return answer.ok ? null : refusal(answer);
}

function showUploads() {
  const { done, failed, running, waiting } = uploads;
  const total = done + failed.length + running + waiting.length;
  byId("uploads").hidden = total === 0;
  const busy = running + waiting.length > 0;
  const told = [busy ? `Adding ${done} of ${total}` : `${done} added`];
  if (failed.length) told.push(`${failed.length} not`);
  byId("upload-state").textContent = told.join(", ");
  byId("upload-progress").hidden = !busy;
  byId("upload-progress").value = uploads.bytes ? uploads.sent / uploads.bytes : 0;
  byId("retry").hidden = busy || !failed.some((each) => each.again);
  byId("dismiss").hidden = busy;
}

function dismiss() {
  Object.assign(uploads, { done: 0, failed: [], bytes: 0, sent: 0 });
  byId("upload-list").replaceChildren();
  showUploads();
}

// A folder that is dropped brings the files in it.
async function filesOf(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.some((entry) => entry.isDirectory)) return transfer.files;
  const found = [];
  for (const entry of entries) await gather(entry, found);
  return found;
}

async function gather(entry, found) {
  if (entry.isFile) {
    found.push(await new Promise((file, fault) => entry.file(file, fault)));
    return;
  }
  const reader = entry.createReader();
  for (;;) {
    const some = await new Promise((read, fault) => reader.readEntries(read, fault));
    if (!some.length) return;
    for (const each of some) await gather(each, found);
  }
}

function acceptFiles() {
  const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
  byId("files").addEventListener("change", (event) => {
    take(event.target.files);
    event.target.value = "";
  });
  addEventListener("dragover", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  addEventListener("drop", async (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    document.body.classList.remove("dropping");
    take(await filesOf(event.dataTransfer));
  });
  byId("retry").addEventListener("click", retry);
  byId("dismiss").addEventListener("click", dismiss);
}

// --- Captions ---

const pending = new Map(); // fields with words that are not saved, and their timers
const saving = new Map(); // fields whose words are on their way

function write(name, text, headers, keepalive = false) {
  const all = { "Content-Type": "application/json", Accept: "application/json", ...headers };
  return fetch(pathOf("captions", name), { method: "PUT", headers: all, body: JSON.stringify({ text }), keepalive });
}

function say(field, text, kind = "") {
  const state = byId(`${field.id}-state`);
  state.textContent = text;
  state.className = `saved ${kind}`;
}

function written(field) {
  clearTimeout(pending.get(field));
  pending.set(field, setTimeout(() => save(field), PAUSE));
  say(field, "");
}

// One request at a time for a caption; what is written meanwhile follows.
async function save(field, keepalive = false) {
  if (!pending.has(field)) return saving.get(field);
  if (saving.has(field)) {
    await saving.get(field);
    return save(field);
  }
  clearTimeout(pending.get(field));
  pending.delete(field);
  say(field, "Saving…");
  const work = store(field, keepalive).finally(() => saving.delete(field));
  saving.set(field, work);
  return work;
}

async function store(field, keepalive) {
  const place = field.closest(".caption");
  let answer;
  try {
    answer = await write(place.dataset.name, field.value, { "If-Match": `"${place.dataset.etag}"` }, keepalive);
  } catch {
    say(field, "Not saved: no connection. It is tried again.", "bad");
    pending.set(field, setTimeout(() => save(field), 5_000));
    return;
  }
  if (answer.ok) {
    settle(place, (await answer.json()).etag);
    say(field, "Saved", "good");
  } else if (answer.status === 412) await showConflict(field, place);
  else say(field, `Not saved: ${await refusal(answer)}`, "bad");
}

function settle(place, etag) {
  place.dataset.etag = etag;
  place.querySelector("[name=etag]").value = etag;
  place.querySelector(".conflict")?.remove();
}

// Both texts are shown, and whoever reads them chooses.
async function showConflict(field, place) {
  const there = await (await fetch(pathOf("captions", place.dataset.name))).json();
  if (there.text === field.value.trim()) {
    settle(place, there.etag);
    say(field, "Saved", "good");
    return;
  }
  say(field, "Changed elsewhere", "bad");
  const box = document.createElement("div");
  box.className = "conflict stack small";
  const told = document.createElement("p");
  told.textContent = there.text ? `There it says: ${there.text}` : "There it is empty.";
  const choices = document.createElement("p");
  choices.className = "row";
  choices.append(
    choice("Take that", () => {
      field.value = there.text;
      settle(place, there.etag);
      say(field, "Saved", "good");
    }),
    choice("Keep mine", () => {
      settle(place, there.etag);
      written(field);
      save(field);
    }),
  );
  box.append(told, choices);
  place.querySelector(".conflict")?.remove();
  place.querySelector(".words").append(box);
}

function choice(text, act) {
  const button = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  button.className = "button small";
  button.addEventListener("click", act);
  return button;
}

function saveAll(keepalive = false) {
  return Promise.all([...pending.keys()].map((field) => save(field, keepalive)).concat([...saving.values()]));
}

function move(field, by) {
  const fields = [...document.querySelectorAll(".caption textarea")];
  const next = fields[fields.indexOf(field) + by];
  next?.focus();
  next?.closest(".caption").scrollIntoView({ block: "nearest" });
}

function editCaptions() {
  main.addEventListener("input", (event) => event.target.matches(".caption textarea") && written(event.target));
  main.addEventListener("focusout", (event) => event.target.matches(".caption textarea") && save(event.target));
  main.addEventListener("keydown", (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!by || !event.ctrlKey || !event.target.matches(".caption textarea")) return;
    event.preventDefault();
    move(event.target, by);
  });
  addEventListener("pagehide", () => saveAll(true));
}

// --- The rest of the page ---

// Takes the page anew from the server; words that are being written stay, and so does the focus.
async function refresh() {
  await saveAll();
  const answer = await fetch(location.href, { headers: { Accept: "text/html" } }).catch(() => null);
  if (!answer?.ok || pending.size) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  const focus = document.activeElement?.id;
  for (const id of ["counts", "content"]) byId(id).replaceWith(document.adoptNode(fresh.getElementById(id)));
  for (const now of fresh.querySelectorAll(".head .button.primary")) {
    if (!document.querySelector(".head .button.primary")) document.querySelector(".head .row").append(now);
  }
  dress();
  if (focus) byId(focus)?.focus({ preventScroll: true });
}

function dress() {
  for (const each of document.querySelectorAll(".needs-script")) each.hidden = false;
  for (const each of document.querySelectorAll(".without-script")) each.hidden = true;
}

// Forms that read captions wait for those on their way.
function sendForms() {
  main.addEventListener("submit", async (event) => {
    const form = event.target;
    event.preventDefault();
    if (form.matches(".words")) return save(form.querySelector("textarea"));
    await saveAll();
    if (!form.matches(".remove")) return form.submit();
    const place = form.closest(".caption");
    const next = place.nextElementSibling ?? place.previousElementSibling;
    const answer = await fetch(pathOf("images", place.dataset.name), { method: "DELETE" });
    if (!answer.ok && answer.status !== 404) {
      say(place.querySelector("textarea"), await refusal(answer), "bad");
      return;
    }
    next?.querySelector("textarea")?.focus({ preventScroll: true });
    refresh();
  });
}

// Says how many captions a replacement would change, before it does.
function countReplacements() {
  let waiting;
  main.addEventListener("input", (event) => {
    const form = event.target.closest("#replace");
    if (!form) return;
    clearTimeout(waiting);
    waiting = setTimeout(() => count(form), 300);
  });
}

async function count(form) {
  const told = byId("replace-count");
  told.textContent = "";
  if (!form.former.value) return;
  const replace = { from: form.former.value, to: form.by.value };
  const body = JSON.stringify({ replace, filter: form.filter.value, dry_run: true });
  const headers = { "Content-Type": "application/json" };
  const answer = await fetch(`${api}/captions`, { method: "POST", headers, body }).catch(() => null);
  if (!answer?.ok) return;
  const { changed } = await answer.json();
  told.textContent = `${changed} ${changed === 1 ? "caption" : "captions"}`;
}

// A job that works on this dataset says how far it is; at its end the page is taken anew.
function watchJob() {
  if (!main.dataset.job) return;
  const show = ({ phase, step, total_steps: total }) => {
    if (!byId("job-progress")) return;
    if (total) Object.assign(byId("job-progress"), { max: total, value: step ?? 0 });
    byId("job-state").textContent = total ? `${step ?? 0} of ${total}` : (phase ?? "");
  };
  const ours = (brief) => brief.job_id === main.dataset.job && show(brief);
  listen(main.dataset.job, "", {
    snapshot: ({ job }) => job && show(job),
    state: ours,
    end: refresh,
  });
}

dress();
acceptFiles();
editCaptions();
sendForms();
countReplacements();
watchJob();
