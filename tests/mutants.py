"""Breaks the program on purpose, one way at a time, and sees whether the named tests notice. Not part of the test suite.

    python -m tests.mutants                      # all of them: some minutes, those that train last
    python -m tests.mutants "reference swapped"  # only those whose name contains it
    python -m tests.mutants --list

Each mutation is made in a copy of the checkout that has no real data beside it, after its tests have passed there. It is
caught if every test that it names fails. Exit code 0: all caught; 1: one survived; 2: a text to replace is not found just
once, so that the list below must follow the code, or a test fails without any mutation.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 900


@dataclass(frozen=True)
class Mutation:
    name: str
    where: str
    """A file, or a folder in one of whose files the text stands: what moves within its room is found again."""
    text: str
    """Stands just once in `where`."""
    replacement: str
    tests: tuple[str, ...]
    """Each must fail; of several cases of one test, any."""


MUTATIONS = (
    Mutation(
        "a digest check skipped",
        "pipeline/store/artifact.py",
        "elif digest and digest(path) not in (None, entry.sha256):",
        "elif False:",
        (
            "tests/unit/test_checkpoints.py::test_a_damaged_checkpoint_is_passed_over_for_the_one_before",
            "tests/unit/test_store.py::test_verify_names_what_differs",
        ),
    ),
    Mutation(
        "fsync left out of files and folders",
        "pipeline/store",
        "os.fsync(descriptor)",
        "pass",
        (
            "tests/unit/test_durable.py::test_all_of_a_checkpoint_and_every_folder_on_the_way_is_flushed_before_its_list",
            "tests/unit/test_durable.py::test_all_of_an_artifact_and_every_folder_on_the_way_is_flushed_before_it_appears",
        ),
    ),
    Mutation(
        "fsync left out of what replaces a file",
        "pipeline/store",
        "os.fsync(file.fileno())\n        temporary.replace(path)",
        "pass\n        temporary.replace(path)",
        (
            "tests/unit/test_durable.py::test_all_of_a_checkpoint_and_every_folder_on_the_way_is_flushed_before_its_list",
            "tests/unit/test_durable.py::test_all_of_an_artifact_and_every_folder_on_the_way_is_flushed_before_it_appears",
        ),
    ),
    Mutation(
        "fsync left out of a checkpoint",
        "pipeline/store/checkpoints.py",
        "        sync_below(folder)\n",
        "",
        (
            "tests/unit/test_durable.py::test_all_of_a_checkpoint_and_every_folder_on_the_way_is_flushed_before_its_list",
        ),
    ),
    Mutation(
        "fsync left out of an artifact",
        "pipeline/store/store.py",
        "            sync_below(out)\n",
        "",
        (
            "tests/unit/test_durable.py::test_all_of_an_artifact_and_every_folder_on_the_way_is_flushed_before_it_appears",
        ),
    ),
    Mutation(
        "one moment for both on the way to another layout",
        "stages/lib/training/whole_state.py",
        "pieces.parts.append(cut(state[name]))",
        'pieces.parts.append(cut(state["exp_avg"]))',
        ("tests/integration/test_whole_state.py::test_every_layout_holds_the_same",),
    ),
    Mutation(
        "count of steps lost on the way to ZeRO",
        "stages/lib/training/converting.py",
        '        state["step"].fill_(max(float(state["step"]), saved.steps))\n',
        "",
        ("tests/distributed/test_elastic_resume.py::test_losses_go_on_as_they_would_have",),
    ),
    Mutation(
        "gc forgets what artifacts were made from",
        "pipeline/store/collect.py",
        "ahead += read_manifest(store.artifact_folder(artifact_id)).input_ids.values()",
        "pass",
        ("tests/unit/test_collect.py::test_an_artifact_keeps_what_it_was_made_from_without_its_work_folder",),
    ),
    Mutation(
        "rotation keeps one checkpoint whatever is asked",
        "pipeline/store/checkpoints.py",
        "kept = set(good[-self.keep :])",
        "kept = {good[-1]}",
        (
            "tests/unit/test_checkpoints.py::test_rotation_keeps_the_newest_and_deletes_nothing_while_the_newest_does_not_verify",
            "tests/unit/test_checkpoints.py::test_rotation_counts_only_good_checkpoints",
        ),
    ),
    Mutation(
        "end token out of the mask",
        "stages/lib/text",
        "return [1] * len(offsets)",
        "return [1] * (len(offsets) - 1) + [0]",
        ("tests/unit/test_chat_template.py::test_ids_and_masks_are_those_of_apply_chat_template",),
    ),
    Mutation(
        "held-out prompts are trained on",
        "stages/lib/curation/mixing.py",
        "row.content in contents or row.shared in shared",
        "row.content in contents",
        ("tests/integration/test_mix.py",),
    ),
    Mutation(
        "warmup begins one step late",
        "stages/lib/training/params.py",
        "return (step + 1) / (warmup + 1)",
        "return step / (warmup + 1)",
        ("tests/unit/test_training_params.py",),
    ),
    Mutation(
        "KL rewarded instead of paid for",
        "stages/lib/formulas/policy_gradient.py",
        "rewards_NK = -kl_coefficient * kl_NK * mask_NK",
        "rewards_NK = kl_coefficient * kl_NK * mask_NK",
        ("tests/numerics/test_policy_gradient.py", "tests/numerics/test_on_policy_loss.py::test_the_advantages_of_ppo"),
    ),
    Mutation(
        "advantages that depend on how wide the padding is",
        "stages/lib/formulas/policy_gradient.py",
        "next_value_N = torch.where(is_said_N, values_NK[:, place], next_value_N)",
        "next_value_N = torch.where(is_said_N, values_NK[:, place], place - next_value_N)",
        ("tests/numerics/test_policy_gradient.py::test_advantages_do_not_see_padding",),
    ),
    Mutation(
        "the worst completion of a prompt preferred to its best",
        "stages/lib/formulas/policy_gradient.py",
        "(signs_GS * ~all_equal(groups_GS)).flatten()",
        "(-signs_GS * ~all_equal(groups_GS)).flatten()",
        (
            "tests/numerics/test_online_dpo_loss.py::test_loss_and_gradient_are_those_of_the_formula",
            "tests/numerics/test_online_dpo_loss.py::test_the_best_of_each_prompt_stands_against_its_worst",
        ),
    ),
    Mutation(
        "the critic learns from padding",
        "stages/lib/on_policy",
        'self.algorithm.value_coefficient * terms["value_loss"] * mask',
        'self.algorithm.value_coefficient * terms["value_loss"]',
        ("tests/numerics/test_on_policy_loss.py",),
    ),
    Mutation(
        "the ratio of a completion a product instead of a geometric mean",
        "stages/lib/formulas/policy_losses.py",
        " / mask_BK.sum(-1, keepdim=True).clamp(min=1.0)",
        "",
        ("tests/numerics/test_policy_losses.py::test_gspo_by_hand",),
    ),
    Mutation(
        "weights of CISPO with a gradient",
        "stages/lib/formulas/policy_losses.py",
        "(logp_BK - old_logp_BK).exp().detach()",
        "(logp_BK - old_logp_BK).exp()",
        ("tests/numerics/test_policy_losses.py::test_cispo_by_hand",),
    ),
    Mutation(
        "completions that were cut off counted among the tokens of a step that leaves them out",
        "stages/lib/on_policy",
        "return float(sum(self.learned_tokens(each) for each in episodes))",
        "return float(sum(len(each.ids) for each in episodes))",
        ("tests/numerics/test_policy_loss_options.py::test_a_truncated_completion_is_left_out",),
    ),
    Mutation(
        "groups that score alike kept",
        "stages/lib/on_policy",
        "(without_signal if equal else kept).append(episodes)",
        "kept.append(episodes)",
        ("tests/unit/test_dynamic_sampling.py::test_groups_that_score_alike_are_replaced_by_hand",),
    ),
    Mutation(
        "where the next rollout draws from forgotten by a restart",
        "stages/lib/on_policy",
        '"drawn": self.drawn,',
        '"drawn": 0,',
        ("tests/distributed/test_dynamic_sampling_resume.py::test_killed_and_started_again",),
    ),
    Mutation(
        "a tie counts as lost",
        "stages/lib/formulas/calibration.py",
        "(chosen_N >= rejected_N).double()",
        "(chosen_N > rejected_N).double()",
        ("tests/numerics/test_heldout_scores.py",),
    ),
    Mutation(
        "one half of the smoothed labels dropped",
        "stages/lib/formulas/preference_losses.py",
        " - label_smoothing * logsigmoid(-difference_N)",
        "",
        ("tests/numerics/test_preference_losses.py",),
    ),
    Mutation(
        "all passes over the rows in one order",
        "stages/lib/training/scheduling.py",
        "np.random.PCG64([self.seed, epoch])",
        "np.random.PCG64([self.seed, 0])",
        ("tests/distributed/test_training_library.py",),
    ),
    # From here on tests train.
    Mutation(
        "weights in training written with in the background",
        "stages/lib/generating/transformers.py",
        "return TransformersSampler(self.replica,",
        "return TransformersSampler(self.policy,",
        (
            (
                "tests/integration/test_on_policy_options.py"
                "::test_rollouts_in_the_background_are_those_of_the_policy_one_rollout_ago"
            ),
        ),
    ),
    Mutation(
        "reference swapped",
        "stages/lib/preferring/objective.py",
        "*(ref_2N.chunk(2) if",
        "*(reversed(ref_2N.chunk(2)) if",
        (
            "tests/integration/test_dpo.py::test_the_loss_starts_at_log_2",
            "tests/integration/test_dpo.py::test_the_margin_is_beta_times_the_difference_of_changes",
            "tests/numerics/test_preferences_against_trl.py::test_dpo",
        ),
    ),
    Mutation(
        "the mean reward forgotten at a restart",
        "stages/lib/training/carrying.py",
        "return {KEY: carried} if carried else {}",
        "return {}",
        ("tests/integration/test_preference_family.py::test_what_a_loss_carries_is_carried_over_a_stop",),
    ),
    Mutation(
        "tails of the reference counted in full",
        "stages/lib/preferring/reference.py",
        "answer_logprobs(model, batch, self.tail_weight)",
        "answer_logprobs(model, batch)",
        ("tests/integration/test_preference_family.py::test_the_reference_counts_tails_as_the_policy_does",),
    ),
    Mutation(
        "a micro batch sorted as a whole",
        "stages/lib/preferring/objective.py",
        "vector.split(self.params.sorted_pairs)",
        "vector.split(len(vector))",
        ("tests/integration/test_preference_family.py::test_micro_batches_change_nothing[aot]",),
    ),
    Mutation(
        "reference pass swapped",
        "stages/lib/preferring/reference.py",
        "reshape(self.width, -1).T",
        "reshape(self.width, -1)[::-1].T",
        (
            "tests/integration/test_dpo.py::test_reference_logprobs_are_those_of_the_input_model",
            "tests/integration/test_dpo.py::test_the_loss_starts_at_log_2",
        ),
    ),
    Mutation(
        "the reference point of each process's own answers",
        "stages/lib/preferring/unpaired_objective.py",
        "self.kl = reference_point(total / count)",
        "self.kl = reference_point(sums[0] / sums[1])",
        ("tests/integration/test_kto.py::test_two_processes_train_what_one_trains[None]",),
    ),
    Mutation(
        "answers of the same prompt taken for mismatched ones",
        "stages/lib/preferring/unpaired.py",
        "if prompts[(place + k) % count] != prompt",
        "if k",
        ("tests/unit/test_unpaired.py::test_a_mismatched_answer_is_that_of_the_next_other_prompt",),
    ),
    Mutation(
        "undesirable answers weighed as desirable ones",
        "stages/lib/preferring/unpaired_objective.py",
        "torch.where(desirable_N, self.params.desirable_weight, self.params.undesirable_weight)",
        "torch.where(desirable_N, self.params.desirable_weight, self.params.desirable_weight)",
        (
            "tests/integration/test_kto.py::test_weights_weigh_the_loss",
            "tests/numerics/test_unpaired_against_trl.py::test_value_and_gradient",
        ),
    ),
    Mutation(
        "dropout depends on the place in the micro batch",
        "stages/lib/training",
        "seed_of(seed, positions[index % count], index // count)",
        "seed_of(seed, index % count, index // count)",
        (
            "tests/invariants/test_dropout_invariance.py::test_losses_with_dropout_do_not_depend_on_how_a_step_is_spread",
        ),
    ),
    Mutation(
        "what is computed again draws something else",
        "stages/lib/training",
        "after, now.counts = now.counts, Counter(counts)",
        "after = now.counts",
        (
            "tests/numerics/test_row_dropout.py::test_what_is_computed_again_draws_what_it_drew",
            "tests/numerics/test_row_dropout.py::test_a_layer_that_is_called_twice_drops_twice_and_the_same_when_computed_again",
        ),
    ),
    Mutation(
        "a reference is not called twice",
        "stages/lib/preferring/reference.py",
        "        require_quiet(model, str(self.folder))\n",
        "",
        (
            "tests/integration/test_dropout_off.py::test_a_reference_that_forgets_is_refused_and_taken_once_its_rate_is_0",
        ),
    ),
    Mutation(
        "what no dropout draws is not seeded",
        "stages/lib/training",
        "torch.manual_seed(seed_of(self.ctx.seed, positions[0]))",
        "pass",
        (
            "tests/distributed/test_training_library.py::test_what_is_drawn_by_no_dropout_differs_between_steps_is_repeated_by_a_seed_and_is_told",
        ),
    ),
    Mutation(
        "loss of fixed data not multiplied by the number of processes",
        "stages/lib/training",
        "return loss_sum / torch.tensor(units, dtype=loss_sum.dtype) * self.ctx.world.size",
        "return loss_sum / torch.tensor(units, dtype=loss_sum.dtype)",
        ("tests/invariants/test_training_invariance.py::test_losses_do_not_depend_on_how_a_step_is_spread",),
    ),
    Mutation(
        "loss of on-policy training not multiplied by the number of processes",
        "stages/lib/on_policy",
        "return loss.sum() / tokens * self.ctx.world.size",
        "return loss.sum() / tokens",
        ("tests/numerics/test_on_policy_loss.py::test_processes_do_not_change_the_loss",),
    ),
    Mutation(
        "the second text of a pair not compared",
        "stages/lib/rows/canonical.py",
        '        optional=("text_pair",),\n',
        "",
        ("tests/unit/test_pairs.py::test_both_texts_are_what_a_pair_says",),
    ),
    Mutation(
        "a pair and its reverse held apart",
        "stages/lib/rows/canonical.py",
        "canonical_json(sorted(texts_of_pair(row)))",
        "canonical_json(texts_of_pair(row))",
        (
            "tests/unit/test_pairs.py::test_a_pair_and_its_reverse_stay_on_one_side",
            "tests/unit/test_pairs.py::test_a_reversed_pair_is_not_trained_on_when_it_is_held_out",
        ),
    ),
    Mutation(
        "a declared second text may be missing",
        "stages/lib/sources/layouts_labels.py",
        '"text_pair" in conversion.declared or ',
        "",
        ("tests/unit/test_formats.py::test_where_a_second_text_is_declared_every_row_must_have_one",),
    ),
    Mutation(
        "words counted as often as a text says them",
        "stages/lib/encoding/bags.py",
        "return np.unique(np.fromiter((zlib.crc32(each.encode()) for each in bag(row)), dtype=np.int64))",
        "return np.sort(np.fromiter((zlib.crc32(each.split()[0].encode()) for each in bag(row)), dtype=np.int64))",
        ("tests/unit/test_bags.py::test_scores_are_those_of_naive_bayes",),
    ),
    Mutation(
        "ratings that are missing taken for 0",
        "stages/lib/preferring",
        "torch.where(rated_N1A, loss_NHA, 0.0)",
        "loss_NHA",
        ("tests/numerics/test_reward_losses.py::test_missing_ratings_are_left_out",),
    ),
    Mutation(
        "uncertainty added to a score",
        "stages/lib/formulas",
        "mean_N - uncertainty_penalty *",
        "mean_N + uncertainty_penalty *",
        ("tests/numerics/test_reward_losses.py::test_the_score_of_heads_and_attributes",),
    ),
    Mutation(
        "levels cut at a rating instead of between two",
        "stages/lib/formulas",
        "(low + high) / 2",
        "high",
        (
            "tests/numerics/test_reward_losses.py::test_ordinal_loss_in_a_slow_loop",
            "tests/numerics/test_reward_losses.py::test_the_ordinal_loss_is_least_at_a_level_between_equal_neighbours",
        ),
    ),
    Mutation(
        "all heads learning from the same rows",
        "stages/lib/preferring",
        "loss_NH = loss_NH * weight_NH",
        "weight_NH = weight_NH",
        (
            "tests/numerics/test_reward_losses.py::test_heads_learn_from_their_own_samples",
            "tests/numerics/test_reward_losses.py::test_samples_of_the_bootstrap",
        ),
    ),
    Mutation(
        "a step without a label called wrong",
        "stages/lib/preferring",
        "(marks_BT == WRONG) | (marks_BT == RIGHT)",
        "marks_BT > 0",
        ("tests/numerics/test_reward_losses.py::test_steps_are_learned_as_transformers_learns_labels_of_tokens",),
    ),
    Mutation(
        "an adapter of the output layer merged into the embeddings too",
        "stages/lib/models/adapters",
        "if adds and head is not None and head.weight is embeddings.weight:",
        "if False:",
        (
            "tests/integration/test_merge.py::test_layers_that_share_their_weight_get_their_own[head]",
            "tests/integration/test_merge.py::test_layers_that_share_their_weight_get_their_own[embeddings]",
        ),
    ),
    Mutation(
        "a mixture whose weights are left out",
        "stages/lib/models/adapters",
        "before[key].detach().double()) * weight",
        "before[key].detach().double())",
        ("tests/integration/test_merge.py::test_a_mixture_adds_what_each_adapter_adds",),
    ),
    Mutation(
        "a wish to stop that nobody hears while rewards score",
        "stages/lib/processes",
        "                if self.asked_to_stop():\n                    raise Abandoned\n",
        "",
        ("tests/unit/test_contained.py::test_a_program_is_abandoned_where_its_caller_is_to_stop",),
    ),
    Mutation(
        "a rank goes on before the last one has come",
        "pipeline/running/rendezvous.py",
        "            if VERDICT in welcome:\n                require_same(work, welcome[VERDICT])\n                return\n",
        '            require_same(work, welcome.get(VERDICT, ""))\n            return\n',
        ("tests/unit/test_rendezvous.py::test_nobody_goes_on_before_the_last_one_has_come",),
    ),
    Mutation(
        "what a rank said last time believed",
        "pipeline/running/rendezvous.py",
        "answer = numbers if missing else {**numbers, VERDICT: odd_ones(found)}",
        "answer = {**numbers, VERDICT: odd_ones(found)} if all(numbers.values()) else numbers",
        ("tests/unit/test_rendezvous.py::test_what_a_rank_said_last_time_is_not_believed",),
    ),
    Mutation(
        "a connection that is over not noticed",
        "pipeline/running/lifeline.py",
        "event & (select.POLLERR | select.POLLHUP)",
        "event & select.POLLNVAL",
        ("tests/unit/test_lifeline.py::test_a_reader_that_is_gone_is_noticed",),
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="parts of names; all mutations without")
    parser.add_argument("--list", action="store_true", help="print the mutations and what must notice them")
    options = parser.parse_args(arguments)
    chosen = [each for each in MUTATIONS if not options.names or any(name in each.name for name in options.names)]
    if not chosen:
        print(f"no mutation is named so: {', '.join(options.names)}; --list prints them", file=sys.stderr)
        return 2
    if options.list:
        for each in chosen:
            print(f"{each.name}  ({each.where})", *each.tests, sep="\n    ")
        return 0
    lost = [said for each in chosen if isinstance(said := place_of(CHECKOUT, each), str)]
    if lost:
        print(*lost, sep="\n", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder) / "checkout"
        copy_checkout(copy)
        return judge(copy, chosen)


def place_of(checkout: Path, mutation: Mutation) -> Path | str:
    """The file with the text to replace; a sentence where it does not stand just once."""
    place = checkout / mutation.where
    files = sorted(place.rglob("*.py")) if place.is_dir() else [place] if place.exists() else []
    found = [path for path in files for _ in range(path.read_text(encoding="utf-8").count(mutation.text))]
    if len(found) == 1:
        return found[0]
    times = "not found" if not found else f"found {len(found)} times"
    return f"{mutation.name}: pattern {times} in {mutation.where}: {mutation.text.strip()!r}. Change it in tests/mutants.py."


def copy_checkout(target: Path) -> None:
    """Copies what git knows or would add, as it lies there now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=CHECKOUT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (CHECKOUT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(CHECKOUT / name, target / name)


def judge(copy: Path, chosen: Sequence[Mutation]) -> int:
    """Prints a line per mutation, with the tests that failed; returns the exit code."""
    tests = sorted({test for each in chosen for test in each.tests})
    broken, output = failed_tests(copy, tests)
    if broken or output:
        print("fails without any mutation:", *(broken or [output]), sep="\n    ", file=sys.stderr)
        return 2
    survivors = 0
    for each in chosen:
        place = place_of(copy, each)
        assert isinstance(place, Path)
        original = place.read_text(encoding="utf-8")
        place.write_text(original.replace(each.text, each.replacement), encoding="utf-8")
        failed, output = failed_tests(copy, each.tests)
        place.write_text(original, encoding="utf-8")
        blind = [test for test in each.tests if not any(name.startswith(test) for name in failed)]
        survivors += bool(blind)
        print(f"{'SURVIVED' if blind else 'caught  '}  {each.name}", flush=True)
        for name in dict.fromkeys(name.partition("[")[0] for name in failed):
            print(f"              failed: {name}", flush=True)
        for name in blind:
            print(f"              PASSED: {name} {output}".rstrip(), flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutations were caught")
    return 1 if survivors else 0


def failed_tests(copy: Path, tests: Sequence[str]) -> tuple[list[str], str]:
    """The ids of the tests that failed; and what pytest said, where it could not run them, or skipped or found none."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return [], f"(no end after {TIMEOUT_SECONDS} s)"
    lines = done.stdout.splitlines()
    failed = [line.split()[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    passed = done.returncode in (0, 1) and "skipped" not in lines[-1]
    return failed, "" if passed else f"(pytest: {(done.stdout + done.stderr)[-500:]})"


if __name__ == "__main__":
    sys.exit(main())
