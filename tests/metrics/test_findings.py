"""The labeller on sentences whose findings a reader would not argue about, and the figures made of it."""

from __future__ import annotations

import json

import pytest

from medim.metrics import findings
from medim.metrics.findings import FIVE, STATUSES, Labeller, label, labeller, rule_f1

P, U, A, N = STATUSES
EFFUSION, PTX, EDEMA, HEART = "pleural_effusion", "pneumothorax", "pulmonary_edema", "cardiomegaly"

SENTENCES = [
    # plainly told
    ("Small left pleural effusion.", {EFFUSION: P}),
    ("Cardiomegaly.", {HEART: P}),
    ("The heart is mildly enlarged.", {HEART: P}),
    ("The cardiac silhouette remains markedly enlarged.", {HEART: P}),
    ("Blunting of the right costophrenic angle.", {EFFUSION: P}),
    ("Bilateral effusions with bibasilar atelectasis.", {EFFUSION: P, "atelectasis": P}),
    ("There are bilateral apical pneumothoraces.", {PTX: P}),
    ("The aorta is tortuous and calcified.", {"tortuous_aorta": P, "calcification_of_the_aorta": P}),
    ("Tip of the Port-A-Cath in the SVC.", {"central_venous_catheter": P}),
    ("An NG tube and an ETT are in place.", {"enteric_tube": P, "endotracheal_tube": P}),
    ("Dual-chamber pacemaker with intact leads.", {"pacemaker_electronic_cardiac_device_or_wires": P}),
    ("Patchy ground-glass opacities in both lungs.", {"ground_glass_opacity": P, "air_space_opacity": P}),
    ("Old healed rib fractures on the left.", {"non_acute_rib_fracture": P, "fracture_generic": P}),
    # plainly denied
    ("No pneumothorax.", {PTX: A}),
    ("No evidence of pleural effusion or pneumothorax.", {EFFUSION: A, PTX: A}),
    ("No focal consolidation, pleural effusion, or pneumothorax.", {"consolidation": A, EFFUSION: A, PTX: A}),
    ("No effusion, edema or pneumonia is seen.", {EFFUSION: A, EDEMA: A, "pneumonia": A}),
    ("There is no pleural effusion and no pneumothorax.", {EFFUSION: A, PTX: A}),
    ("Neither effusion nor pneumothorax is present.", {EFFUSION: A, PTX: A}),
    ("The lungs are clear without consolidation or edema.", {"consolidation": A, EDEMA: A}),
    ("The lungs are free of consolidation.", {"consolidation": A}),
    ("Negative for pneumonia.", {"pneumonia": A}),
    ("The heart is not enlarged.", {HEART: A}),
    ("There isn't a pneumothorax.", {PTX: A}),
    ("Absence of pleural effusion.", {EFFUSION: A}),
    ("Lungs are clear w/o pneumonia.", {"pneumonia": A}),
    ("Pneumothorax: none.", {PTX: A}),
    # denied after the finding
    ("Pneumothorax is not seen.", {PTX: A}),
    ("Pleural effusion or pneumothorax is not identified.", {EFFUSION: A, PTX: A}),
    ("The previously seen pneumothorax is no longer visualized.", {PTX: A}),
    ("The left effusion has resolved.", {EFFUSION: A}),
    ("Pneumonia has been ruled out.", {"pneumonia": A}),
    ("The endotracheal tube has been removed.", {"endotracheal_tube": A}),
    ("Interval removal of the right chest tube.", {"intercostal_drain": A}),
    ("Interval resolution of pulmonary edema.", {EDEMA: A}),
    # scope ends
    ("No pneumothorax. Small effusion.", {PTX: A, EFFUSION: P}),
    ("No pneumothorax, but there is a small effusion.", {PTX: A, EFFUSION: P}),
    ("There is no effusion; however, cardiomegaly persists.", {EFFUSION: A, HEART: P}),
    ("No acute abnormality other than mild cardiomegaly.", {HEART: P}),
    ("No consolidation although there is mild pulmonary edema.", {"consolidation": A, EDEMA: P}),
    ("No pneumothorax, stable cardiomegaly.", {PTX: A, HEART: P}),
    ("No pneumothorax, the heart is enlarged.", {PTX: A, HEART: P}),
    ("There is no pneumothorax and the heart is enlarged.", {PTX: A, HEART: P}),
    ("No effusion or pneumothorax, pacemaker in place.", {EFFUSION: A, PTX: A,
        "pacemaker_electronic_cardiac_device_or_wires": P}),
    ("Small effusion, pneumothorax is not seen.", {EFFUSION: P, PTX: A}),
    ("The effusion is small and pneumothorax is not seen.", {EFFUSION: P, PTX: A}),
    ("Mild edema is present, no effusion.", {EDEMA: P, EFFUSION: A}),
    ("No large effusion, mild edema, or pneumothorax.", {EFFUSION: A, EDEMA: A, PTX: A}),
    ("Atelectasis without effusion.", {"atelectasis": P, EFFUSION: A}),
    ("Effusion: moderate. Pneumothorax: absent.", {EFFUSION: P, PTX: A}),
    ("No evidence of pneumonia, however, a subtle consolidation may be present.", {"pneumonia": A, "consolidation": U}),
    ("There is no pneumothorax with a small left effusion.", {PTX: A, EFFUSION: P}),
    ("Mild cardiomegaly with no edema and small effusions.", {HEART: P, EDEMA: A, EFFUSION: P}),
    ("Without pneumothorax or effusion, the lungs show atelectasis.", {PTX: A, EFFUSION: A, "atelectasis": P}),
    # a "no" that denies nothing
    ("Not without effusion.", {EFFUSION: P}),
    ("No change in the moderate pleural effusion.", {EFFUSION: P}),
    ("No significant interval change in pulmonary edema.", {EDEMA: P}),
    ("The pneumothorax has not resolved.", {PTX: P}),
    ("No resolution of the consolidation.", {"consolidation": P}),
    ("The pleural effusion is not significantly changed.", {EFFUSION: P}),
    ("Not only atelectasis but also consolidation is seen.", {"atelectasis": P, "consolidation": P}),
    ("The effusion has nearly resolved.", {EFFUSION: P}),
    ("There is no doubt about the pneumothorax.", {PTX: P}),
    # doubt
    ("Possible small pleural effusion.", {EFFUSION: U}),
    ("Opacity which may represent pneumonia.", {"pneumonia": U}),
    ("Basilar opacity, atelectasis versus pneumonia.", {"atelectasis": U, "pneumonia": U}),
    ("Pneumonia cannot be excluded.", {"pneumonia": U}),
    ("A small pneumothorax is not excluded.", {PTX: U}),
    ("Cannot rule out pneumonia.", {"pneumonia": U}),
    ("Findings suggestive of mild pulmonary edema.", {EDEMA: U}),
    ("Consolidation is suspicious for pneumonia.", {"consolidation": P, "pneumonia": U}),
    ("Questionable right pneumothorax.", {PTX: U}),
    ("Pneumonia is unlikely.", {"pneumonia": U}),
    ("Pneumonia is unlikely but cannot be excluded.", {"pneumonia": U}),
    ("A trace effusion is possible.", {EFFUSION: U}),
    ("No pneumothorax, possible small effusion.", {PTX: A, EFFUSION: U}),
    ("No pneumothorax, but a small effusion cannot be excluded.", {PTX: A, EFFUSION: U}),
    ("No definite effusion.", {EFFUSION: A}),
    ("Recommend CT to evaluate for pneumonia.", {"pneumonia": U}),
    ("Likely atelectasis at the left base, no effusion.", {"atelectasis": U, EFFUSION: A}),
    ("R/o pneumonia.", {"pneumonia": U}),
    # the strongest mention counts
    ("Possible effusion. Moderate pleural effusion on the left.", {EFFUSION: P}),
    ("No right pneumothorax. Small left apical pneumothorax.", {PTX: P}),
    ("No right effusion. Possible left effusion.", {EFFUSION: U}),
    # words that look alike
    ("Small pericardial effusion.", {EFFUSION: N}),
    ("Subcutaneous emphysema along the chest wall.", {"subcutaneous_emphysema": P, "emphysema": N}),
    ("Peripheral edema of the legs.", {EDEMA: N}),
    ("The heart is normal, large hiatal hernia.", {HEART: N, "hiatus_hernia": P}),
    ("Portable view of the chest shows the ET tube.", {"intercostal_drain": N, "endotracheal_tube": P}),
    ("History of pneumonia.", {"pneumonia": N}),
    ("Low sensitivity for pneumothorax in the supine position.", {PTX: N}),
    # sections that ask
    ("INDICATION: Rule out pneumonia.\nFINDINGS: Clear lungs.", {"pneumonia": N}),
    ("HISTORY: pacemaker, effusion?\n\nSmall effusion.", {EFFUSION: P,
        "pacemaker_electronic_cardiac_device_or_wires": N}),
    ("COMPARISON: Pneumothorax last week. IMPRESSION: 1. No pneumothorax. 2. Cardiomegaly.", {PTX: A, HEART: P}),
    ("Impression:\n1. Mild cardiomegaly\n2. No effusion", {HEART: P, EFFUSION: A}),
]  # fmt: skip


@pytest.mark.parametrize(("sentence", "expected"), SENTENCES, ids=[sentence for sentence, _ in SENTENCES])
def test_sentences(sentence: str, expected: dict[str, str]):
    got = label(sentence)
    assert {name: got[name] for name in expected} == expected


def test_the_table_is_radlabels():
    table = json.loads(findings.PHRASES.read_text())
    assert "radlabels 0.2.0" in table["origin"]
    assert "MIT License" in (findings.PHRASES.parent / "LICENSE").read_text()
    assert len(table["findings"]) == 49
    assert sum(len(entry["phrases"]) for entry in table["findings"].values()) == 649
    assert set(FIVE) <= set(table["findings"]) == set(label(""))


def test_every_phrase_is_found_alone():
    table = json.loads(findings.PHRASES.read_text())["findings"]
    for name, entry in table.items():
        for phrase in entry["phrases"]:
            assert label(f"There is {phrase}.")[name] == "present", phrase
            assert label(f"There is no {phrase}.")[name] == "absent", phrase


def test_empty_and_odd_texts_name_nothing():
    for text in ("", " \n", "...", "___", "12.5 cm", "¿señor?", "no", "cannot be excluded", ": , :"):
        assert set(label(text).values()) == {"unmentioned"}


def test_evidence_and_own_phrases():
    reader = Labeller({"stone": ["kidney stone"]}, {"stone": ["no kidney"]})
    (mention,) = reader.mentions("Two stones of the left kidney.")
    assert (mention.finding, mention.status, mention.words) == ("stone", "present", "stones of the left kidney")
    assert reader.label("INDICATION: kidney stone") == {"stone": "unmentioned"}
    assert Labeller({"stone": ["kidney stone"]}, sections=False).label("INDICATION: kidney stone") == {
        "stone": "present"
    }
    assert labeller() is labeller()


def test_rule_f1_counts():
    hypotheses = ["Cardiomegaly. Small pleural effusion.", "No pneumothorax.", "", " "]
    references = ["Cardiomegaly. No effusion. Pneumothorax.", "Clear lungs.", "Possible pneumothorax.", "Clear lungs."]
    found = rule_f1(hypotheses, references)
    assert found["rule_f1"].form == "f1"
    assert found["rule_f1"].rows.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert found["rule_f1"].value == pytest.approx(0.4)
    assert found["rule_f1-5"].rows.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert found["rule_f1_example"].rows[:, 0].tolist() == [0.5, 1.0, 0.0, 0.0]
    assert rule_f1(hypotheses, references, doubt=False)["rule_f1"].rows[2].tolist() == [0, 0, 0]
    assert rule_f1(references, references)["rule_f1"].value == 1.0


def test_rule_f1_of_unequal_lists():
    with pytest.raises(ValueError, match="give as many"):
        rule_f1(["x"], [])
    with pytest.raises(ValueError, match="one at least"):
        rule_f1([], [])
