// Comparing: pictures open large, the number of pictures asked for is told, and new ones appear.

import { listen, refresher } from "./live.js";
import { opensFrom, rowsOfTable } from "./viewer.js";

const $ = (id) => document.getElementById(id);

for (const table of document.querySelectorAll(".film")) opensFrom(table, () => rowsOfTable(table));

// --- How many pictures would be drawn ---

const form = $("draw-form");
const words = (text, between) => text.split(between).map((each) => each.trim()).filter(Boolean).length;

function count() {
  const files = form.querySelectorAll("[name=checkpoint]:checked").length;
  const strengths = words(form.elements.strengths.value, /[,;\s]+/);
  const seeds = words(form.elements.seeds.value, /[,;\s]+/);
  const prompts = words(form.elements.prompts.value, "\n");
  const all = (files * strengths + 1) * prompts * seeds;
  $("count").textContent = `${all.toLocaleString("en")} pictures, those without the LoRA among them`;
}

form?.addEventListener("input", count);
if (form) count();

// --- What is being drawn ---

const under = $("under-way");
const rows = new Map();
const isHere = (brief) => document.getElementById(`job-${brief.job_id}`);

function take(brief) {
  const row = isHere(brief);
  if (!row) return;
  if (brief.state === "completed" && row.dataset.state !== "completed") location.reload();
  if (!rows.has(brief.job_id)) rows.set(brief.job_id, refresher(`/runs/${brief.job_id}/part/row`, 1_000));
  rows.get(brief.job_id)();
}

if (under) listen(null, "", { snapshot: ({ jobs }) => jobs.filter(isHere).forEach(take), state: take });
