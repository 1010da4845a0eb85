"""Pages as the server sends them: whole without a script, true to the store, closed to tricks."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from acting import MODEL, acting, is_in, status_when, submitted, wanted

from studio import film, machine_page, new_page, run_page, views, words
from studio.status import brief
from studio.store import Job, new_id

if TYPE_CHECKING:
    from serving import Served

    from studio.settings import Settings

STUDIO = Path(views.__file__).parent
TEMPLATES, STATIC = STUDIO / "templates", STUDIO / "static"
HTML = {"Accept": "text/html"}
HOSTILE = '"><img src=x onerror=alert(1)>{{7*7}}'
NUMBERS = itertools.count()
# What a preflight says in the end, as far as the page shows it.
REPORT: dict[str, Any] = {
    "images": 3,
    "captions_found": 3,
    "captions_missing": 0,
    "total_steps": 12,
}
REPORT |= {"effective_batch": 1, "steps_per_epoch": 3, "disk_needed_bytes": None}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Provide one studio for all tests here."""
    with acting(tmp_path_factory.mktemp("pages")) as served:
        yield served


@pytest.fixture(scope="module")
def finished(studio: Served) -> str:
    """Provide a run that has ended well."""
    job_id = submitted(studio, **wanted(sample_prompts=["zkb", "a cat"]), name="Ink <style>")
    status_when(studio, job_id, is_in("completed"))
    return job_id


def get(studio: Served, address: str, status: int = 200) -> str:
    """Get a page as it is written."""
    answer = studio.client.get(address, headers=HTML)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("text/html")
    return str(answer.text)


def send(studio: Served, address: str, *pairs: tuple[str, str], **form: str) -> httpx.Response:
    """Send a form as a browser does."""
    body = str(httpx.QueryParams([*pairs, *form.items()]))
    headers = HTML | {"Content-Type": "application/x-www-form-urlencoded"}
    return studio.client.post(address, content=body, headers=headers)


def planted(studio: Served, state: str, **columns: Any) -> str:
    """Put a job into the store as if it had come to a state."""
    config = {"trigger_words": ["zkb"], "base_model": str(MODEL), **columns.pop("config", {})}
    values = {"kind": "train", "name": f"Planted {next(NUMBERS)}", "slots": 0, **columns}
    ended_at = values.pop("ended_at", None)
    store = studio.app.state.store
    job: Job = store.insert(Job(id=new_id(), config=config, state=state, **values))
    (studio.settings.job(job.id) / "output").mkdir(parents=True)
    with store.writing() as db:
        db.execute("UPDATE jobs SET ended_at = ? WHERE id = ?", (ended_at, job.id))
        if state != "queued":
            db.execute(
                "INSERT INTO attempts(job, n, handle, started_at, outcome) "
                "VALUES(?, 1, 'x', ?, 'error')",
                (job.id, job.created_at),
            )
    return job.id


# --- What is on the disk ---


def test_vendored_files_are_those_that_npm_has() -> None:
    """By the hashes that stand beside them."""
    listed = re.findall(
        r"^([0-9a-f]{64})  (\S+)$", (STATIC / "vendor" / "VENDOR.txt").read_text(), re.MULTILINE
    )
    there = {path.name for path in (STATIC / "vendor").iterdir()} - {"VENDOR.txt"}
    assert {name for _, name in listed} == there
    for digest, name in listed:
        content = (STATIC / "vendor" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == digest, name


class Inline(HTMLParser):
    """Finds what the policy forbids."""

    def __init__(self) -> None:
        """Find nothing yet."""
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note styles and scripts in the page itself."""
        names = [name for name, _ in attrs]
        self.found += [
            f"{tag} {name}" for name in names if name == "style" or name.startswith("on")
        ]
        if tag == "style" or (tag == "script" and "src" not in names):
            self.found.append(tag)


@pytest.mark.parametrize("path", sorted(TEMPLATES.glob("*.html")), ids=lambda path: path.name)
def test_templates_hold_no_script_and_no_style(path: Path) -> None:
    """The policy would refuse them."""
    parser = Inline()
    parser.feed(path.read_text("utf-8"))
    assert parser.found == []


def test_nothing_names_another_host() -> None:
    """Namespaces are names, and the licence names its author."""
    own = [*TEMPLATES.glob("*.html"), *STATIC.glob("*.*")]
    for path in own:
        found = set(re.findall(r"https?://[\w.]+", path.read_text("utf-8")))
        assert found <= {"http://www.w3.org"}, path.name


def test_every_template_escapes() -> None:
    """Not one marks a text as safe, or switches that off."""
    for path in TEMPLATES.glob("*.html"):
        assert not re.search(r"\|\s*safe|autoescape", path.read_text("utf-8")), path.name


def test_symbols_that_are_used_are_there() -> None:
    """A name that leads nowhere would be an empty place."""
    there = set(re.findall(r'<symbol id="([\w-]+)"', (STATIC / "symbols.svg").read_text("utf-8")))
    text = "".join(path.read_text("utf-8") for path in TEMPLATES.glob("*.html"))
    used = set(re.findall(r'symbol\("([\w-]+)"\)', text))
    assert used | {name.lower().replace(" ", "-") for _, name in views.PLACES} <= there


# --- Words ---


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 bytes"),
        (52_072, "52.1 KB"),
        (123_400_000, "123 MB"),
        (6.8e9, "6.8 GB"),
        (None, "unknown"),
    ],
)
def test_sizes_read_well(value: float | None, text: str) -> None:
    """In the unit that suits them."""
    assert views.show_bytes(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3.2, "3 s"),
        (185, "3 min 5 s"),
        (1800, "30 min"),
        (7_800, "2 h 10 min"),
        (180_000, "2 d 2 h"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    """By their two largest units."""
    assert views.show_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(1500, "1,500"), (0.083123, "0.0831"), (1e-4, "1e-4"), (2.5e-5, "2.5e-5")]
)
def test_numbers_read_well(value: float, text: str) -> None:
    """With as many digits as help."""
    assert views.show_number(value) == text


def status(state: str, **more: Any) -> dict[str, Any]:
    """Make a status as the REST API tells it."""
    nothing = dict.fromkeys(("step", "total_steps", "loss", "eta_seconds", "phase", "position"))
    nothing |= dict.fromkeys(("final", "error", "continues_from", "ended_at", "silent_seconds"))
    return {
        "job_id": "X",
        "kind": "train",
        "name": "N",
        "state": state,
        "desired": "run",
        **nothing,
        **more,
    }


@pytest.mark.parametrize(
    ("told", "words_for_it"),
    [
        (status("queued", position=1), "Next in the queue."),
        (status("queued", position=3), "3rd in the queue."),
        (status("queued", desired="hold"), "Waits until you continue it."),
        (status("running", phase="encoding images"), "Encoding images"),
        (
            status("running", step=420, total_steps=1000, loss=0.0831),
            "Step 420 of 1,000 · loss 0.0831",
        ),
        (
            status("completed", step=400, final={"total_time": 431, "bytes": 12e6}),
            "400 steps · 7 min 11 s · 12.0 MB",
        ),
        (
            status("stopped", step=620, total_steps=1000, continues_from="output/state/step_600"),
            "Stopped at step 620 of 1,000; continues from step 600.",
        ),
        (status("stopped"), "Stopped before the first step."),
        (
            status("failed", error={"message": "No room.", "hint": "Make some."}),
            "No room. Make some.",
        ),
        (
            status("stopped", step=620, error={"message": "It may still run there."}),
            "It may still run there.",
        ),
        (status("cancelled"), "Cancelled before it began."),
    ],
)
def test_how_a_job_stands_is_said_in_a_line(told: dict[str, Any], words_for_it: str) -> None:
    """The same line in every list."""
    assert words.told(told) == words_for_it


def test_silence_is_told_when_it_is_long_for_this_run() -> None:
    """A step of a minute is silent for a minute."""
    assert words.stale(status("running", silent_seconds=119)) is None
    assert "No news for 2 min 5 s" in str(words.stale(status("running", silent_seconds=125)))
    assert words.stale(status("running", silent_seconds=125, seconds_per_step=60)) is None
    long = status("running", silent_seconds=190, seconds_per_step=1, total_steps=100_000)
    assert words.stale(long) is None  # a line tells of a hundred steps
    assert "No news" in str(words.stale(long | {"silent_seconds": 210}))


def test_a_status_tells_how_long_a_step_takes() -> None:
    """Or nobody knows what silence is long."""
    job = Job("J", "train", "A run", {}, progress={"seconds_per_step": 1.5})
    assert brief(job, None, None)["seconds_per_step"] == 1.5


def sample(step: int, name: str, prompt: str = "zkb") -> dict[str, Any]:
    """Make a line that tells of a picture."""
    return {"step": step, "image_path": f"/elsewhere/samples/{name}", "prompt": prompt, "seed": 1}


def test_previews_are_laid_out_by_prompt_and_step() -> None:
    """In the order of the newest round; a picture that was drawn again counts once."""
    lines = [
        sample(0, "step_0.png", "old"),
        sample(20, "step_20_2.png", "b"),
        sample(20, "step_20.png", "a"),
    ]
    laid = film.film_of([*lines, sample(20, "step_20.png", "a")])
    assert (laid.prompts, laid.steps, len(laid.cells)) == (("a", "b", "old"), (0, 20), 3)
    assert laid.newest == laid.at("a", 20)


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "..\\..\\x.png", "javascript:alert(1)", "../../x.png"]
)
def test_a_picture_is_looked_for_in_the_folder_of_samples_alone(path: str) -> None:
    """Whatever an event says."""
    made = film.preview_of({"image_path": path}, 1)
    assert re.fullmatch(r"samples/[^/\\]+", made.file)


# --- Lists and runs ---


def test_an_empty_studio_says_what_to_do(tmp_path: Path) -> None:
    """Three steps, and one button."""
    with acting(tmp_path) as fresh:
        text = get(fresh, "/")
    assert "Teach a model something new" in text
    assert 'class="job"' not in text


def test_the_list_shows_every_state_and_what_can_be_done(studio: Served, finished: str) -> None:
    """With a picture where there is one."""
    stopped = planted(studio, "stopped", step=6, total_steps=12, continues_from="/x/state/step_4")
    error = {"code": "out_of_memory", "message": "No room.", "hint": "Make some."}
    failed = planted(studio, "failed", step=3, error=error)
    text = unescape(get(studio, "/"))
    assert f'src="/jobs/{finished}/files/output/samples/step_12.png?thumb=384"' in text
    assert "Stopped at step 6 of 12; continues from step 4." in text
    assert "No room. Make some." in text
    assert f'action="/runs/{stopped}/resume?list=1"' in text
    assert f'action="/runs/{failed}/resume?list=1"' in text
    assert f'href="/jobs/{finished}/files/output/lora_final.safetensors"' in text


def test_the_list_is_filtered_by_kind_and_goes_back_page_by_page(
    studio: Served, finished: str
) -> None:
    """A kind that does not exist is no filter."""
    assert finished not in get(studio, "/?kind=caption")
    assert finished in get(studio, "/?kind=nonsense")
    assert finished not in get(studio, f"/?before={finished}")


def test_a_run_shows_its_pictures_files_messages_and_settings(
    studio: Served, finished: str
) -> None:
    """All of it as text and links, before any script runs."""
    text = unescape(get(studio, f"/runs/{finished}"))
    for step in (4, 8, 12):
        assert f'href="/jobs/{finished}/files/output/samples/step_{step}.png"' in text
        assert (
            f'href="/jobs/{finished}/files/output/checkpoints/lora_step_{step}.safetensors"' in text
        )
    assert '<polyline points="' in text
    assert re.search(r"The loss (fell|rose|stayed) ", text)
    assert "Finished LoRA" in text
    assert re.search(
        r"<th scope=\"row\">Steps</th><td class=\"mono\">12</td><td[^>]*>1000</td>", text
    )


@pytest.fixture(scope="module")
def overfitted(studio: Served) -> str:
    """Provide a run with an image held back, which was met best half-way."""
    asked = wanted(steps=16, checkpoint_steps=4, validation_steps=4, validation_split=1)
    job_id = submitted(studio, **asked)
    status_when(studio, job_id, is_in("completed"))
    return job_id


def test_a_run_shows_how_images_held_back_are_met(studio: Served, overfitted: str) -> None:
    """By a curve, a sentence, and the file that met them best."""
    text = unescape(get(studio, f"/runs/{overfitted}"))
    assert text.count("<polyline") == 2
    assert re.search(r"On images held back \(the line with dots\) it (fell|rose|stayed)", text)
    assert "It was least at step 8: 0.25." in text
    assert re.search(r"Step 8 <small>least loss on images held back</small>", text)
    final = studio.client.get(f"/status/{overfitted}").json()["final"]
    assert final["best_checkpoint"] == "output/checkpoints/lora_step_8.safetensors"
    assert final["best_step"] == 8


def test_what_speaks_against_a_run_is_told_with_what_to_take(
    studio: Served, overfitted: str
) -> None:
    """Nobody looks for it among the messages."""
    text = unescape(get(studio, f"/runs/{overfitted}/part/state"))
    better = f"/jobs/{overfitted}/files/output/checkpoints/lora_step_8.safetensors"
    assert "Overfitted since step 8. Take the LoRA of that step" in text
    assert f'href="{better}" download' in text


def ended(studio: Served, **final: Any) -> str:
    """Plant a training that has ended so; files that are named are there."""
    job_id = planted(studio, "completed", step=12, total_steps=12)
    output = studio.settings.job(job_id) / "output"
    for name in [name for name in final if name.endswith("_path")]:
        final[name] = str(output / final[name])
        path = Path(final[name])
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"LoRA")
    with studio.app.state.store.writing() as db:
        db.execute("UPDATE jobs SET final = ? WHERE id = ?", (json.dumps(final), job_id))
    return job_id


def test_a_run_says_what_was_learned(studio: Served) -> None:
    """The loss with and without it, on which images, and how much it changes."""
    numbers = {"loss_before": 0.2, "loss_after": 0.15, "moved": 0.123, "best_step": None}
    told = unescape(get(studio, f"/runs/{ended(studio, **numbers)}"))
    assert "<dt>Loss on the images</dt><dd>0.15, 0.2 without it</dd>" in told
    assert "<dt>It changes predictions by</dt><dd>12 %</dd>" in told
    numbers |= {"best_step": 8, "moved_without_trigger": 0.004}
    told = unescape(get(studio, f"/runs/{ended(studio, **numbers)}"))
    assert "<dt>Loss on images held back</dt>" in told
    assert "<dt>Least at step</dt><dd>8</dd>" in told
    assert "<dd>12 %, 0.4 % without the trigger words</dd>" in told


def test_a_learned_word_is_offered_as_loras_are(studio: Served) -> None:
    """Under its own name, by which programs call it; alone, it is what the run came to."""
    word = "embeddings/zkb_embedding.safetensors"
    job_id = ended(studio, final_path=word, embedding_path=word)
    early = studio.settings.job(job_id) / "output" / "embeddings" / "embedding_step_4.safetensors"
    early.write_bytes(b"early")
    text = unescape(get(studio, f"/runs/{job_id}"))
    assert re.search(r"Learned word <small>zkb_embedding.safetensors</small>", text)
    assert re.search(r"Step 4 <small>learned word</small>", text)
    at = f"/jobs/{job_id}/files/output/{word}"
    assert text.count(f'href="{at}"') == 2
    assert (
        'filename="zkb_embedding.safetensors"'
        in studio.client.get(at).headers["content-disposition"]
    )
    assert studio.client.get(f"/status/{job_id}").json()["final"]["embedding"] == f"output/{word}"
    assert "embedding" not in get(studio, f"/compare?run={job_id}")


@pytest.mark.parametrize(
    ("dataset", "rows"),
    [
        ({}, []),
        ({"buckets": [1]}, []),
        ({"buckets": {"64x32": 5}}, []),
        (
            {"buckets": {"64x32": {"images": 1500, "cropped": 0.1234, "cropped_at_most": "much"}}},
            [("64\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}32", "1,500", "12 %", None)],
        ),
    ],
)
def test_sizes_of_training_are_laid_out_where_they_are_told(
    dataset: dict[str, Any], rows: list[tuple[str, ...]]
) -> None:
    """Whatever an event says."""
    assert run_page.buckets_of(dataset) == rows


def test_what_the_page_links_to_is_there(studio: Served, finished: str) -> None:
    """Every file and every picture of it."""
    text = unescape(get(studio, f"/runs/{finished}"))
    for address in set(re.findall(r'(?:href|src)="(/jobs/[^"]+)"', text)):
        assert studio.client.get(address).status_code == 200, address


@pytest.mark.parametrize("part", ["state", "film", "files", "row"])
def test_parts_of_a_page_come_alone(studio: Served, finished: str, part: str) -> None:
    """Without a frame, each with the id by which it is put in place."""
    text = get(studio, f"/runs/{finished}/part/{part}")
    assert "<html" not in text
    assert re.search(r'id="(state|film|files|job-\w+)"', text)


def test_a_failed_run_leads_to_the_field_that_is_to_change(studio: Served) -> None:
    """With what the trainer said last."""
    problem = {"path": "lora_rank", "expected": "8 or less", "found": "16", "hint": "Saves 1 GiB."}
    error = {
        "code": "out_of_memory",
        "message": "No room.",
        "hint": "See problems.",
        "problems": [problem],
    }
    failed = planted(studio, "failed", step=3, error=error | {"tail": "the end <b>"})
    text = get(studio, f"/runs/{failed}")
    link = f'<a href="/new?from={failed}&amp;focus=lora_rank">LoRA rank</a>'
    assert f"{link}: Expected 8 or less, got 16." in text
    assert "the end &lt;b&gt;" in text
    assert "Code out_of_memory" in text


def test_a_run_that_is_not_there_is_a_page_that_says_so(studio: Served) -> None:
    """With the way back."""
    text = get(studio, "/runs/NOPE", 404)
    assert "There is no job NOPE." in text
    assert get(studio, "/runs/NOPE/part/state", 404)


# --- What people ask for ---


def test_stopping_and_continuing_work_by_forms(studio: Served) -> None:
    """The browser is sent back to the run; continuing with more steps extends it."""
    job_id = submitted(studio, **wanted(steps=4000))
    answer = send(studio, f"/runs/{job_id}/stop")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/runs/{job_id}")
    stopped = status_when(studio, job_id, is_in("stopped", "cancelled"))
    answer = send(studio, f"/runs/{job_id}/resume", steps=str((stopped["step"] or 0) + 2))
    assert answer.status_code == 303, answer.text
    assert status_when(studio, job_id, is_in("completed"))["step"] == (stopped["step"] or 0) + 2


def test_a_finished_run_is_extended_by_more_steps_alone(studio: Served, finished: str) -> None:
    """Fewer are refused in the trainer's words, and nothing changes."""
    answer = send(studio, f"/runs/{finished}/resume", steps="many")
    assert answer.status_code == 422
    assert "whole number" in unescape(answer.text)
    assert studio.client.get(f"/status/{finished}").json()["state"] == "completed"


def test_names_are_given_and_jobs_thrown_away_by_forms(studio: Served) -> None:
    """Into the trash, from which a person can take them back."""
    job_id = planted(studio, "stopped")
    assert (
        send(studio, f"/runs/{job_id}/rename", name="  Better ").headers["location"]
        == f"/runs/{job_id}"
    )
    assert "<h1>Better</h1>" in get(studio, f"/runs/{job_id}")
    assert send(studio, f"/runs/{job_id}/rename", name=" \n ").status_code == 422
    assert send(studio, f"/runs/{job_id}/delete").headers["location"] == "/"
    assert get(studio, f"/runs/{job_id}", 404)
    assert [path for path in studio.settings.trash.iterdir() if job_id in path.name]


def test_a_waiting_job_may_go_first(studio: Served) -> None:
    """Before all others that wait."""
    ids = [planted(studio, "queued", desired="hold") for _ in range(3)]
    assert send(studio, f"/runs/{ids[-1]}/sooner?list=1").headers["location"] == "/"
    assert studio.app.state.store.queue()[0].id == ids[-1]
    for job_id in ids:
        studio.app.state.store.transition(job_id, "cancelled")


def test_the_theme_is_kept_in_a_cookie_and_only_leads_back_here(studio: Served) -> None:
    """Without a script, and without a flash of the other one."""
    answer = send(studio, "/theme", theme="dark", back="/machine")
    assert answer.headers["location"] == "/machine"
    assert "theme=dark" in answer.headers["set-cookie"]
    page = studio.client.get("/", headers=HTML | {"Cookie": "theme=dark"}).text
    assert '<html lang="en" data-theme="dark">' in page
    for foreign in ("https://evil.example/", "//evil.example", "/\\evil.example"):
        assert send(studio, "/theme", theme="auto", back=foreign).headers["location"] == "/"


# --- A new run ---


def filled(**more: str) -> dict[str, str]:
    """Fill the form in."""
    form = {"name": "Mine", "dataset": "imps", "base_model": str(MODEL), "trigger_words": "zkb"}
    return form | {"steps": "12", "resolution": "256", "do": "start", **more}


def test_the_form_starts_a_run_without_a_script(studio: Served) -> None:
    """And what was filled in is what is trained."""
    answer = send(studio, "/new", **filled(sample_prompts="a zkb\r\na cat", flip="false"))
    assert answer.status_code == 303, unescape(answer.text)
    job_id = answer.headers["location"].rpartition("/")[2]
    config = studio.app.state.store.job(job_id).config
    assert (config["steps"], config["sample_prompts"]) == (12, ["a zkb", "a cat"])
    assert config["lora_name"] == "Mine"
    assert "flip" not in config


def test_problems_come_back_beside_their_fields_with_all_that_was_typed(studio: Served) -> None:
    """And above the form, each with a link."""
    answer = send(
        studio, "/new", **filled(resolution="500", learning_rate="fast", sample_prompts="a\r\nb")
    )
    text = unescape(answer.text)
    assert answer.status_code == 422
    assert re.search(r'id="resolution" name="resolution" value="500"[^>]*aria-invalid="true"', text)
    assert re.search(
        r'id="learning_rate" name="learning_rate" value="fast"[^>]*aria-invalid="true"', text
    )
    assert re.search(r'id="resolution-problem">Expected [^<]*multiple of 8[^<]*500', text)
    assert '<a href="#learning_rate">Learning rate</a>' in text
    assert ">a\r\nb</textarea>" in text
    assert re.search(r'id="run-name" name="name" value="Mine"', text)


def test_a_check_tells_what_the_trainer_thinks_and_starts_nothing(studio: Served) -> None:
    """The same words with a script and without one."""
    before = len(studio.app.state.store.jobs(limit=1000))
    whole = unescape(send(studio, "/new", **filled(do="check")).text)
    part = unescape(send(studio, "/new/check", **filled()).text)
    for text in (whole, part):
        assert "3 images, each with a caption" in text
        assert re.search(r"Fits: about [\d.]+ .B of [\d.]+ .B free", text)
        assert "12 steps, 1 image each" in text
    assert len(studio.app.state.store.jobs(limit=1000)) == before


def test_what_a_preset_fills_in_is_told_with_its_reasons(studio: Served) -> None:
    """Before the start beside the form, and after it among the settings."""
    values = {"learning_rate": 1e-4, "lora_rank": 8, "unheard_of": 1}
    told = {"verb": "sets", "preset": "style", "values": values, "reasons": {"lora_rank": "Small."}}
    rows = new_page.filled_in(studio.app.state, told)
    assert rows == [("Learning rate", "0.0001", ""), ("LoRA rank", "8", "Small.")]
    check = {"valid": True, "report": REPORT, "warnings": [], "preset": told, "filled": rows}
    page = views.environment().get_template("new_check.html")
    text = page.render(check={**check, "memory": None, "buckets": []})
    assert "The preset style sets 2 settings" in text
    assert "Small." in text
    job_id = planted(studio, "completed", config={"lora_rank": None})
    folder = studio.settings.job(job_id) / "attempts" / "1"
    folder.mkdir(parents=True)
    line = {"type": "info", "topic": "preset", "message": "m", "data": told}
    (folder / "stdout.jsonl").write_text(json.dumps(line) + "\n", encoding="ascii")
    text = get(studio, f"/runs/{job_id}")
    assert re.search(r">LoRA rank</th><td class=\"mono\">8</td>", text)


def test_other_machines_are_offered_when_there_are_any(studio: Served) -> None:
    """One that is unknown is refused, and nothing is lost."""
    assert 'name="engine"' not in get(studio, "/new")
    answer = send(studio, "/new", **filled(engine="peer:gone"))
    assert answer.status_code == 422
    assert "peer:gone" in unescape(answer.text)
    studio.app.state.engines["peer:big"] = studio.app.state.engines["local"]
    text = get(studio, "/new")
    del studio.app.state.engines["peer:big"]
    assert '<option value="peer:big">peer:big</option>' in text


def test_a_place_that_is_not_allowed_is_told_at_its_field(studio: Served) -> None:
    """As every other problem."""
    text = unescape(send(studio, "/new/check", **filled(base_model="/etc")).text)
    assert 'data-field="base_model"' in text


def test_a_form_of_very_many_fields_is_refused(studio: Served) -> None:
    """As a problem, not as a fault of ours."""
    answer = send(studio, "/new", *[("a", "1")] * 1001)
    assert answer.status_code == 413
    assert "at most 1,000 fields" in answer.text


def test_a_name_that_is_none_is_told_and_nothing_is_lost(studio: Served) -> None:
    """Also what the studio itself refuses comes back in the form."""
    answer = send(studio, "/new", **filled(name="x" * 101))
    assert answer.status_code == 422
    assert 'name="steps" value="12"' in answer.text


def test_an_earlier_run_fills_the_form(studio: Served, finished: str) -> None:
    """With its dataset and its settings, but not its name and its folder."""
    text = unescape(get(studio, f"/new?from={finished}&focus=steps"))
    assert 'data-focus="steps"' in text
    assert '<option value="imps" selected>' in text
    assert re.search(r'name="steps" value="12"', text)
    assert 'value="Ink <style> 2"' in text
    assert ">zkb\na cat</textarea>" in text
    assert re.search(r'id="lora_name" name="lora_name" value=""', text)


# --- Comparing, and the machine ---


def test_comparing_offers_runs_that_have_pictures_and_lays_them_out(
    studio: Served, finished: str
) -> None:
    """Every prompt with all its steps; a run that is gone is left out."""
    assert f'value="{finished}"' in get(studio, "/compare")
    text = unescape(get(studio, f"/compare?run={finished}&run=GONE"))
    assert "Step 4</th>" in text
    assert text.count(f'href="/jobs/{finished}/files/output/samples/') == 2 * 3


def grid(folder: Path) -> None:
    """Write what tools/generate.py and tools/evaluate.py leave."""
    arms = [("base", None, 0.0), ("step_4", "lora_step_4.safetensors", 0.6), ("step_4", None, 1.0)]
    images = [
        {
            "file": f"images/{lora}/p_w{strength}_s0.png",
            "prompt": "p",
            "lora": lora,
            "strength": strength,
            "seed": 0,
        }
        for lora, _, strength in arms
    ]
    images.append(
        {"file": "../../secret.png", "prompt": "p", "lora": "step_4", "strength": 2.0, "seed": 0}
    )
    loras: list[dict[str, Any]] = [{"id": "base", "file": None, "step": None}]
    loras.append({"id": "step_4", "file": "lora_step_4.safetensors", "step": 4})
    prompts = [{"id": "p", "text": HOSTILE}]
    document = {"prompts": prompts, "loras": loras, "images": images}
    (folder / "grid.json").write_text(json.dumps(document))
    quality = {"mean": 0.61, "half_width": 0.04}
    scored = [
        {
            "arm": "step_4 at 0.6",
            "lora": "step_4",
            "strength": 0.6,
            "quality": quality,
            "flags": ["leaks"],
        }
    ]
    verdict = {
        "recommended": "step_4 at 0.6",
        "recommended_lora": "step_4",
        "recommended_strength": 0.6,
    }
    (folder / "eval.json").write_text(
        json.dumps({**verdict, "arms": scored, "doubts": ["Few seeds."]})
    )


def test_drawn_pictures_and_their_scores_stand_in_a_grid(studio: Served, finished: str) -> None:
    """Rows are checkpoints, columns strengths; the base stands once, the best above all."""
    job_id = planted(
        studio, "completed", kind="evaluate", parent=finished, ended_at="2026-11-01T10:00:00.000Z"
    )
    grid(studio.settings.job(job_id) / "output")
    text = get(studio, f"/compare?run={finished}")
    assert 'Strength 0.6</th><th scope="col">Strength 1</th>' in text
    assert text.count("Without the LoRA</th>") == 1
    assert text.count(f'href="/jobs/{job_id}/files/output/images/base/') == 1
    assert "0.610 ± 0.040" in text
    assert f'href="/jobs/{finished}/files/output/checkpoints/lora_step_4.safetensors"' in text
    assert "secret" not in text
    assert "Few seeds." in text
    assert HOSTILE not in text


def test_drawing_is_asked_for_by_a_form_and_problems_stand_at_their_fields(
    studio: Served, finished: str
) -> None:
    """With what was typed."""
    answer = send(
        studio, f"/compare/{finished}", prompts="a\r\nb", strengths="strong", seeds="0", do="draw"
    )
    text = unescape(answer.text)
    assert answer.status_code == 422
    assert 'value="strong"' in text
    assert "Expected numbers with commas between" in text


def test_what_is_asked_for_is_drawn_and_shown_as_under_way(studio: Served, finished: str) -> None:
    """Of the files that were ticked, at the strengths and with the seeds that were typed."""
    ticked = ("checkpoint", "lora_step_4.safetensors")
    typed = {"prompts": "a\r\nb", "strengths": "0.5, 1", "seeds": "3", "do": "draw"}
    answer = send(studio, f"/compare/{finished}", ticked, **typed)
    assert answer.headers["location"] == f"/compare?run={finished}"
    job = studio.app.state.store.jobs(kind="generate")[0]
    studio.app.state.store.request_stop(job.id)
    names = ("checkpoints", "prompts", "scales", "seeds", "guidance")
    asked = [job.config[name] for name in names]
    assert asked == [["lora_step_4.safetensors"], ["a", "b"], [0.5, 1.0], [3], None]
    assert f'id="job-{job.id}"' in get(studio, f"/compare?run={finished}")


def test_the_machine_is_told(studio: Served) -> None:
    """Processors and who uses them, the disk, and where things lie."""
    text = unescape(get(studio, "/machine"))
    assert "cpu:1" in text
    assert str(studio.settings.models) in text
    assert studio.settings.python in text


def test_the_trainer_says_what_it_sees_and_which_it_is(settings: Settings) -> None:
    """By its own command line; where it cannot be run, nothing is made up."""
    assert "cpu" in {each["device"] for each in machine_page.devices(settings, 0)}
    assert machine_page.trainer_version(settings).startswith("train_lora ")
    nowhere = dataclasses.replace(settings, python="/nowhere/python")
    assert machine_page.devices(nowhere, 0) == []
    assert "/nowhere/python" in machine_page.trainer_version(nowhere)


# --- Tricks ---


def test_hostile_names_are_text_on_every_page(studio: Served, finished: str) -> None:
    """Nothing that someone typed becomes markup, and nothing is evaluated."""
    job_id = planted(studio, "completed", name=HOSTILE, step=1, config={"trigger_words": [HOSTILE]})
    for address in (
        "/",
        f"/runs/{job_id}",
        f"/new?from={job_id}",
        f"/compare?run={job_id}",
        "/compare",
    ):
        text = get(studio, address)
        assert "<img src=x" not in text, address
        assert ">49" not in text, address
    assert "{{7*7}}" in get(studio, "/")


def test_strangers_learn_nothing_of_jobs(studio: Served) -> None:
    """Neither from the login nor from a page that refuses them."""
    with httpx.Client(base_url=studio.settings.url, headers=HTML) as bare:
        page = bare.get("/login").text
        refused = bare.get("/", headers={"Host": "evil.example"})
    assert refused.status_code == 421
    for text in (page, refused.text):
        assert "/runs/" not in text
        assert "Ink" not in text
