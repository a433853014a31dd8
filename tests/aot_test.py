"""Compiling for GPUs that are not here, in processes of their own; cases and what is run where."""

import dataclasses

import pytest

from pallas_kernels import aot
from pallas_kernels.verify import case as cases
from pallas_kernels.verify import runner

needs_aot = pytest.mark.skipif(bool(aot.missing()), reason=aot.missing() or "installed")


@needs_aot
class TestProcesses:
    def test_a_real_program_one_that_unpacks_in_xla_and_one_that_spills(self):
        names = ["as_they_are", "unpacked", "spilling"]
        found = aot.in_process("b200", "tests.aot_children:controls", names, timeout=300)
        good, bad, spilling = (runner._from_plain(values) for values in found)
        assert good.problems == () and good.temp_bytes == 0 and good.arch == "sm_100a"
        (facts,) = good.kernels
        assert facts.kernel == "halve" and facts.tma_loads == 1 and facts.threads == 128
        # Two buffers of 64 x 256 bfloat16, and a barrier
        assert 65536 < facts.shared_bytes < 66000
        (problem,) = bad.problems
        assert problem.startswith("packed args[0] u8[64,256,2] is read by fusion")
        (problem,) = spilling.problems
        assert problem.startswith("halve: ") and "bytes spilled" in problem
        assert spilling.kernels[0].spill_bytes > 0

    def test_a_process_that_dies_says_so_and_its_results_are_kept(self):
        found = aot.in_process("h100", "tests.aot_children:die", {"a": [1]})
        assert next(found) == {"target": "h100", "arguments": {"a": [1]}}
        with pytest.raises(RuntimeError, match="for h100 ended: signal 6\nabout to end"):
            next(found)

    def test_a_process_that_hangs_is_ended(self):
        found = aot.in_process("h100", "tests.aot_children:hang", None, timeout=0.5)
        with pytest.raises(RuntimeError, match="for h100 ended: longer than 0.5 s"):
            next(found)


class TestCases:
    def test_names_of_a_family_differ(self):
        case = cases.Case(
            name="a", format="nvfp4", runs_on=bool, build=lambda _: None, expectations=()
        )
        with pytest.raises(ValueError, match="two cases called a nvfp4"):
            cases.Family(name="f", about="", interpreted="", cases=(case, case))

    def test_every_family_has_cases_for_some_gpu_and_says_what_is_proven(self):
        for name, family in cases.families().items():
            assert family.name == name and family.cases and family.about and family.interpreted

    @needs_aot
    def test_twins_compile_only_what_is_for_each_gpu(self):
        b200, gb200, h100 = (aot.targets()[name] for name in ("b200", "gb200", "h100"))
        together = runner.cases_for([b200, gb200, h100], ["mosaic_sm100"])
        alone = runner.cases_for([gb200], ["mosaic_sm100"])
        assert len(together["b200"]) == len(alone["gb200"]) > len(together["gb200"]) > 0
        assert together["h100"] == []
        vr200 = aot.targets()["vr200"]
        assert len(runner.cases_for([b200, vr200], ["mosaic_sm100"])["vr200"]) == len(
            together["gb200"]
        )

    @needs_aot
    def test_a_case_that_ends_its_process_fails_alone(self, monkeypatch):
        def in_process(target, function, chunk):
            for family, index in chunk:
                if index == 1:
                    raise RuntimeError("ended: signal 6")
                yield dataclasses.asdict(
                    runner._failed(aot.targets()[target], family, index, "", 0)
                )

        monkeypatch.setattr(aot, "in_process", in_process)
        chunk = [("mosaic_sm100", index) for index in range(4)]
        found = list(runner._in_processes("b200", chunk))
        assert [result.problems for result in found] == [("",), ("ended: signal 6",), ("",), ("",)]
