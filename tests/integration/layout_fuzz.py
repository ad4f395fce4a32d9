"""Random models, data, stages and layouts: a layout learns what one rank learns, and an illegal one is refused.

    layout_fuzz.py --sala SALA --mpirun MPIRUN --seed 7 --cases 200      cases 0 to 199 of seed 7
    layout_fuzz.py --sala SALA --mpirun MPIRUN --seed 7 --case 31        that case again

A case is a function of seed and number. A failure prints what differs and the command that repeats it.
"""

import argparse
import hashlib
import pathlib
import shlex
import shutil
import sys
import tempfile
import time

import harness as h
import layouts as l

SAVE = {"every_steps": 1, "keep_last": 99}
VALIDATION = {"fraction": 0.1, "max_tokens": 512}
SEVERAL_HEADS = (1, 2, 3, 4, 6, 8)


class Drawn(h.Draws):
    def __init__(self, seed, number):
        # Neighbouring states of the generator give neighbouring numbers.
        super().__init__(int.from_bytes(hashlib.sha256(f"{seed} {number}".encode()).digest()[:8], "big"))

    def of(self, values):
        return values[self.below(len(values))]

    def coin(self, one_in=2):
        return self.below(one_in) == 0


def draw_layout(draws, most_ranks=8):
    return draws.of([layout for layout in l.all_layouts(most_ranks) if layout.ranks > 1])


def draw_sparse(draws):
    stride = draws.of((2, 4))
    block = stride * draws.of((1, 2, 4))
    init = draws.below(3)
    return {"kernel_size": 2 * stride, "kernel_stride": stride, "block_size": block, "init_blocks": init,
            "window_size": block * draws.below(4), "topk": init + 1 + draws.below(3), "dense_len": draws.of((1, 20, 64, 200))}


def draw_model(draws, tp, mixers=True):
    """One that tp tensor ranks can share."""
    kv_heads = draws.of([n for n in SEVERAL_HEADS if n % tp == 0 or tp % n == 0])
    heads = draws.of([n for n in range(kv_heads, 17) if n % tp == 0 and n % kv_heads == 0])
    layers = 2 + draws.below(3)
    changes = {} if not mixers else {"mixer_types": [draws.of(("minicpm4", "lightning-attn")) for _ in range(layers)]}
    return h.model(hidden_size=draws.of((24, 32, 40)), num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                   head_dim=draws.of((4, 6, 8, 16)), intermediate_size=tp * (8 + draws.below(17)),
                   lightning_nh=tp * (1 + draws.below(16 // tp)), lightning_head_dim=draws.of((4, 6, 8)),
                   vocab_size=draws.of((0, 0, 300, 321, 400)), tie_word_embeddings=draws.coin(), attn_use_rope=draws.coin(),
                   attn_qk_norm=draws.coin(), attn_use_output_gate=draws.coin(), lightning_use_rope=draws.coin(), qk_norm=draws.coin(),
                   use_output_norm=draws.coin(), use_output_gate=draws.coin(), sparse_config=draw_sparse(draws), **changes)


def draw_batch(draws, longest=512, shortest=16):
    return h.batch(1, sequences=1 + draws.below(9), micro=1 + draws.below(4),
                   seq_len=draws.of([n for n in (16, 33, 64, 128, 250, 512) if shortest <= n <= longest]))


def draw_text(draws):
    sentences = draws.of((1, 3, 12))
    return h.data(h.ingest(f"text-{sentences}", documents=900 // (sentences + 1), seed=sentences, most_sentences=sentences),
                  packing=draws.of(("concat", "best_fit", "one_per_sample")), document_mask=not draws.coin(4), validation=VALIDATION)


def base_stage(model):
    """Leaves moments, and the weights as they are: steps of Adam would make more of a rounding."""
    return h.pretrain("base", 2, first=True, model=model, schedule={"shape": "constant", "peak_lr": 0})


def draw_stages(draws, tp):
    """Stages, of which the last is measured, and its phases."""
    kind = draws.of(("pretrain", "pretrain", "pretrain", "sft", "carried", "halo"))
    if kind == "halo":
        phases = ["align", "distil"] + (["finetune"] if draws.coin() else [])
        halo = h.halo("measured", 1, 1, data=draw_text(draws), checkpoint=SAVE,
                      halo={"score": {"text_tokens": 256, "recall_items": 2, "recall_length_tokens": 384, "bootstrap": 0},
                            "softmax_layers": 1, "ce_weight": draws.of((0, 0.5)), "align_loss": draws.of(("mse", "l2_norm")),
                            "trainable": draws.of(("linear_mixers", "mixers", "all")),
                            "nope_at": draws.of(("distil", "next_stage")), "softmax_gate_at": draws.of(("distil", "next_stage"))})
        for phase in phases:
            halo["halo"][phase] = {"batch": draw_batch(draws, 128), "schedule": {"shape": "constant", "peak_lr": 0},
                                   "optimizer": {"clip_norm": 0, "weight_decay": 0, "matrix_lr_multiplier": 1}}
        # Layers are chosen without scores, where a near tie could go either way.
        halo["halo"]["selector"] = "uniform"
        teacher = draw_model(draws, tp, mixers=False)
        halo["halo"]["align_from_teacher"] = draws.coin()
        if halo["halo"]["align_from_teacher"]:  # head by head
            teacher.update({"lightning_nh": teacher["num_attention_heads"], "lightning_head_dim": teacher["head_dim"]})
        return [base_stage(teacher), halo], phases
    model = draw_model(draws, tp)
    common = {"batch": draw_batch(draws), "optimizer": {"clip_norm": 0}, "checkpoint": SAVE, "sparse_attention": not draws.coin(4),
              "recompute": draws.coin()}
    if kind == "pretrain":
        return [h.pretrain("measured", 1, first=True, model=model, data=draw_text(draws), **common)], ["train"]
    base = base_stage(model)
    if kind == "carried":
        return [base, h.pretrain("measured", 1, carry_optimizer=True, data=draw_text(draws), **common)], ["train"]
    common["batch"] = draw_batch(draws, 250, 64)  # longer than a chat, of which there are 89 to train on
    return [base, h.sft("measured", 1, data=h.data(h.chat(), packing=draws.of(("concat", "best_fit")), validation=VALIDATION),
                        **common)], ["train"]


# Where terms of a sum cancel, a gradient is known to fewer digits than each term: norms of queries and keys are the worst. How
# few is seen on one rank, from weights that differ by a relative 1e-7, which is what rounding each of them makes. A layout rounds
# six sums of a layer again, in two to four layers: their errors add up to at most sqrt(24) = 5 of one.
ROUNDING = 1e-7
ROUNDINGS = 5


def noise(case, stages, phase):
    """Relative differences by name that rounding of weights makes on one rank."""
    found = {}
    for number, factor in enumerate((1 + ROUNDING, 1 - ROUNDING)):
        run = case.one.parent / f"noise-{number}"
        if not run.exists():
            h.succeed(h.train(case.config, run, f"{stages[0]['name']}.model.initializer_range={0.1 * factor:.12f}"))
        for name, value in l.largest_differences(case.one, run, case.stage, phase).items():
            found[name] = max(value, found.get(name, 0))
    return found


def legal(seed, number, draws):
    layout = draw_layout(draws)
    stages, phases = draw_stages(draws, layout.tp)
    case = l.Case(f"{seed}-{number}", stages, phases)
    problems = case.problems(layout)
    what = f"{stages[-1]['kind']} on {layout}"
    if not problems:
        return what, problems
    problems = []
    for phase in phases:
        expected = noise(case, stages, phase)
        for name, value in l.largest_differences(case.one, case.directory(layout), case.stage, phase).items():
            if value < l.TOLERANCE:
                continue
            text = f"{phase} {name} differs by {value:.2e}, by rounding of weights {expected.get(name, 0):.2e}"
            what += "; " + text
            if not value < ROUNDINGS * expected.get(name, 0):
                problems.append(text)
    return what, problems


def illegal(seed, number, draws):
    """A layout that the ranks or the model do not allow."""
    layout = draw_layout(draws)
    stages, _ = draw_stages(draws, layout.tp)
    model, sets, ranks = stages[0]["model"], layout.sets(stages[0]["name"]), layout.ranks
    wrong = draws.of(("ranks", "dp") if layout.tp == 1 else ("ranks", "dp", "heads", "kv_heads", "lightning_nh", "intermediate"))
    if wrong == "ranks":
        ranks += 1
    elif wrong == "dp":
        sets.append(f"{stages[0]['name']}.parallel.dp={layout.dp + 1}")
    elif wrong == "heads":
        model["num_key_value_heads"], model["num_attention_heads"] = 1, layout.tp + 1
    elif wrong == "kv_heads":
        model["num_key_value_heads"] = layout.tp * 2 + 1
        model["num_attention_heads"] = model["num_key_value_heads"] * layout.tp
    elif wrong == "lightning_nh":
        model["lightning_nh"] = layout.tp * 2 + 1
    else:
        model["intermediate_size"] = layout.tp * 8 + 1
    config = h.write_pipeline(h.ROOT / "cases" / f"{seed}-{number}", stages)
    run = h.ROOT / "runs" / f"{seed}-{number}"
    result = h.run(h.train(config, run, *sets), ranks=ranks)
    problems = []
    if result.code != 78 or len(result.error_lines) != 1 or "CFG-MESH" not in result.err:
        problems.append(f"not refused with one line of CFG-MESH and exit code 78: {result}")
    if h.checkpoints(run) or h.metrics(run):
        problems.append("something was trained")
    return f"refusal ({wrong}) on {layout}", problems


def run_case(seed, number):
    draws = Drawn(seed, number)
    try:
        return (illegal if draws.coin(8) else legal)(seed, number, draws)
    except (AssertionError, h.subprocess.TimeoutExpired) as error:
        return "case", [str(error)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sala", required=True)
    parser.add_argument("--mpirun", required=True)
    parser.add_argument("--seed", type=int, required=True)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--cases", type=int)
    which.add_argument("--case", type=int)
    options = parser.parse_args()
    h.SALA, h.MPIRUN = str(pathlib.Path(options.sala).resolve()), options.mpirun
    numbers = range(options.cases) if options.case is None else [options.case]
    failed = []
    with tempfile.TemporaryDirectory(prefix="sala-layout-fuzz-") as folder:
        h.ROOT = pathlib.Path(folder)
        for number in numbers:
            started = time.monotonic()
            what, problems = run_case(options.seed, number)
            print(f"{number}: {'ok' if not problems else 'FAILED'}: {what}, {time.monotonic() - started:.1f} s", flush=True)
            for name in ("runs", "cases"):
                if not problems:
                    shutil.rmtree(h.ROOT / name, ignore_errors=True)
            if not problems:
                continue
            failed.append(number)
            command = [sys.executable, *sys.argv[:1], "--sala", options.sala, "--mpirun", options.mpirun, "--seed", options.seed,
                       "--case", number]
            print("  " + "\n  ".join(line for problem in problems for line in problem.splitlines()))
            for path in sorted((h.ROOT / "cases" / f"{options.seed}-{number}").glob("*.yaml")):
                print(f"  --- {path.name}\n  " + path.read_text().replace("\n", "\n  "))
            print("  again: " + shlex.join(str(word) for word in command), flush=True)
            shutil.rmtree(h.ROOT / "runs", ignore_errors=True)
    print(f"{len(numbers)} cases of seed {options.seed}: {len(failed)} failed" + (f": {failed}" if failed else ""))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
