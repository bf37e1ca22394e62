"""From a row's fields to an edit record, or to everything that is wrong with the row."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from stableedit_pl.data.readers.layouts import MISSING, Layout, find, is_absent
from stableedit_pl.data.records import EditRecord, Probe, Problem, kind_of, text_problem

_PROBE_FIELDS = ("prompt", "target")
_PROBE_SHAPE = '{"prompt": "...", "target": "..."}'


class RowParser:
    """Reads one row and collects everything that is wrong with it, so that one run shows all there is to repair.

    Args:
        layout: Where the data set keeps what.
        fields: The row.
        number: As `EditRecord.row`.
        place: The same in words.
    """

    def __init__(self, layout: Layout, fields: Mapping[str, object], number: int, place: str) -> None:
        """See the class."""
        self.problems: list[Problem] = []
        self._layout = layout
        self._fields = fields
        self._number = number
        self._place = place

    def parse(self) -> EditRecord | None:
        """Build the record.

        Returns:
            The record, or None if `problems` says why there is none.
        """
        layout = self._layout
        if layout.is_own:
            known = (layout.prompt, *layout.target, layout.id, layout.subject, layout.rephrases)
            known += (*layout.locality, *layout.multi_hop, layout.personas)
            self._refuse_unknown(self._fields, known)
        prompt = self._text((layout.prompt,), "Give the prompt to edit, or remove the row.")
        target = self._text(layout.target, "Give the new answer, or remove the row.")
        subject = None
        if layout.is_template or (layout.subject and not is_absent(self._fields, layout.subject)):
            subject = self._text((layout.subject,), "Give the subject, or remove the row.")
        if layout.is_template and subject and prompt:
            prompt = self._fill_in(prompt, subject)
        values = (
            self._id(),
            prompt,
            target,
            subject,
            self._texts(layout.rephrases),
            self._probes(layout.locality, shared_answer=layout.shared_answer),
            self._probes(layout.multi_hop),
            self._texts(layout.personas),
            self._number,
        )
        return None if self.problems else EditRecord(*values)

    def _fail(self, field: str, problem: str, remedy: str) -> None:
        self.problems.append(Problem(problem, remedy, field, self._number, self._place))

    def _check(self, field: str, value: object, remedy: str) -> str:
        if problem := text_problem(value):
            self._fail(field, problem[0], problem[1] or remedy)
        return value if isinstance(value, str) else ""

    def _text(self, names: tuple[str, ...], remedy: str) -> str:
        if len(names) == 1 and (value := find(self._fields, names[0])) is not MISSING:
            return self._check(names[0], value, remedy)
        present = [name for name in names if find(self._fields, name) is not MISSING]
        if not present:
            also = "".join(f' (so is "{name}", its name in other versions)' for name in names[1:])
            self._fail(names[0], f"is missing{also}", self._guess(names[0]) + remedy)
            return ""
        value = find(self._fields, present[0])
        for name in present[1:]:
            if find(self._fields, name) != value:
                self._fail(present[0], f'differs from "{name}"', "Either may be meant: keep only the right one.")
        return self._check(present[0], value, remedy)

    def _guess(self, missing: str) -> str:
        parent, dot, last = missing.rpartition(".")
        siblings = find(self._fields, parent) if parent else self._fields
        near = difflib.get_close_matches(last, list(siblings), n=1) if isinstance(siblings, Mapping) else []
        return f'Is it the row\'s "{parent}{dot}{near[0]}"? ' if near else ""

    def _id(self) -> str:
        field = self._layout.id
        value = find(self._fields, field) if field else MISSING
        if value is MISSING:
            return str(self._number)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self._check(field, value, "Give a name of its own, or leave the field out to use the row's number.")

    def _fill_in(self, template: str, subject: str) -> str:
        # Not str.format: any other brace in the prompt is text, and must stay.
        if template.count("{}") != 1:
            problem = f'has {template.count("{}")} places "{{}}" for the subject'
            self._fail(self._layout.prompt, problem, 'Write the prompt with exactly one "{}".')
        return template.replace("{}", subject)

    def _texts(self, field: str) -> tuple[str, ...]:
        if not field or is_absent(self._fields, field):
            return ()
        value = find(self._fields, field)
        remedy = "Give the text, or remove it."
        if isinstance(value, list):
            return tuple(self._check(f"{field}[{i}]", element, remedy) for i, element in enumerate(value))
        if self._layout.is_own:
            self._fail(field, f"is {kind_of(value)}, not a list", 'Write a list of texts: ["..."].')
            return ()
        return (self._check(field, value, remedy),)

    def _probes(self, names: tuple[str, ...], shared_answer: bool = False) -> tuple[Probe, ...]:
        if len(names) == 1:
            return self._probe_objects(names[0])
        if not names or all(is_absent(self._fields, name) for name in names):
            return ()
        prompt_field, answer_field = names
        asked = find(self._fields, prompt_field)
        # A null prompt says that there is none. A missing one beside an answer of its own is likely misnamed.
        if asked is None or (shared_answer and asked in (MISSING, [])):
            return ()
        if asked is MISSING:
            self._fail(prompt_field, f'is missing beside "{answer_field}"', "Give the prompt, or remove the answer.")
            return ()
        known_problems = len(self.problems)
        prompts = self._texts(prompt_field)
        if not shared_answer and isinstance(find(self._fields, answer_field), list):
            answers = self._texts(answer_field)
        else:
            answer = self._text((answer_field,), "Give the answer to the prompt, or remove both.")
            answers = (answer,) * (len(prompts) if shared_answer else 1)
        if len(self.problems) > known_problems:
            return ()
        if len(answers) != len(prompts):
            problem = f'counts {len(answers)} for {len(prompts)} in "{prompt_field}"'
            self._fail(answer_field, problem, "Give one answer for each prompt, in the same order.")
            return ()
        return tuple(map(Probe, prompts, answers))

    def _probe_objects(self, field: str) -> tuple[Probe, ...]:
        if is_absent(self._fields, field):
            return ()
        value = find(self._fields, field)
        if not isinstance(value, list):
            self._fail(field, f"is {kind_of(value)}, not a list", f"Write [{_PROBE_SHAPE}].")
            return ()
        known_problems = len(self.problems)
        pairs = [self._pair(f"{field}[{i}]", element) for i, element in enumerate(value)]
        return () if len(self.problems) > known_problems else tuple(Probe(*pair) for pair in pairs)

    def _pair(self, place: str, value: object) -> tuple[str, str]:
        if not isinstance(value, dict):
            self._fail(place, f"is {kind_of(value)}, not an object", f"Write {_PROBE_SHAPE}.")
            return "", ""
        self._refuse_unknown(value, _PROBE_FIELDS, f"{place}.")
        texts = []
        for name in _PROBE_FIELDS:
            remedy = f"Give the {name}, or remove the pair."
            if name in value:
                texts.append(self._check(f"{place}.{name}", value[name], remedy))
            else:
                self._fail(f"{place}.{name}", "is missing", remedy)
                texts.append("")
        return texts[0], texts[1]

    def _refuse_unknown(self, fields: Iterable[str], known: tuple[str, ...], prefix: str = "") -> None:
        for name in fields:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=2)
                quoted = " or ".join(f'"{other}"' for other in near)
                guess = f"Did you mean {quoted}? " if near else ""
                self._fail(prefix + name, "is unknown", f"{guess}Known fields: {', '.join(known)}.")
