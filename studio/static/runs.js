// The list of runs: rows that change are rendered anew by the server.

import { listen, patch, refresher } from "./live.js";

const refreshers = new Map();
const states = new Map([...document.querySelectorAll(".job")].map((row) => [row.dataset.job, row.dataset.state]));
let reloading = null;

// Another state means another place in the list, and maybe others that move up.
function reload() {
  reloading ??= setTimeout(async () => {
    reloading = null;
    const answer = await fetch(location.href, { headers: { Accept: "text/html" } }).catch(() => null);
    if (!answer?.ok) return;
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
    const lists = fresh.getElementById("lists");
    if (lists && document.getElementById("lists")) patch(lists.outerHTML);
    else if (lists || document.getElementById("lists")) location.reload();
    for (const row of document.querySelectorAll(".job")) states.set(row.dataset.job, row.dataset.state);
  }, 250);
}

function take(brief) {
  const id = brief.job_id;
  const known = states.get(id);
  if (known === brief.state) {
    if (!refreshers.has(id)) refreshers.set(id, refresher(`/runs/${id}/part/row`, 1_000));
    refreshers.get(id)();
  } else {
    states.set(id, brief.state);
    reload();
  }
}

// What the page does not list, as it is old or of another kind, is no news.
const isNews = (brief) => states.has(brief.job_id) && states.get(brief.job_id) !== brief.state;

listen(null, "", {
  snapshot: ({ jobs }) => jobs.filter(isNews).forEach(take),
  state: take,
});

document.getElementById("kind")?.addEventListener("change", (event) => event.target.form.submit());
