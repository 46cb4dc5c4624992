"""Early exit with this folder's sections: python run.py [--threshold SHARE] IMAGE... prints a JSON line per image."""

import hashlib, json, math, pathlib, sys
from typing import Any
import numpy as np, onnxruntime as ort

SCORES: dict[str, Any] = {  # log-probabilities of an exit, and their mean so far, to the answer and how sure it is
    "ensemble": lambda own, mean: (both := mean - np.logaddexp.reduce(mean, 1, keepdims=True), np.exp(both.max(1))),
    "confidence": lambda own, mean: (own, np.exp(own.max(1))),
    "margin": lambda own, mean: (own, np.diff(np.sort(np.exp(own), 1)[:, -2:])[:, 0]),
    "entropy": lambda own, mean: (own, (1 + (np.exp(own) * own.clip(-1e4)).sum(1) / math.log(own.shape[1])).clip(0)),
}


class Network:
    def __init__(self, folder: pathlib.Path) -> None:
        about = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        self.sections, self.classes, self.look = about["sections"], about["classes"], about["preprocess"]
        self.agreement, self.score = about["policy"]["agreement"], SCORES[about["policy"]["kind"]]
        files = [(folder / pathlib.Path(section["file"]).name).read_bytes() for section in self.sections]
        self.sessions = [ort.InferenceSession(file, providers=["CPUExecutionProvider"]) for file in files]
        whole = [hashlib.sha256(file).hexdigest() for file in files] == [section["sha256"] for section in self.sections]
        fits = self.sessions[0].get_inputs()[0].shape[1:] == self.look["input_size"] and max(self.look["resize"]) < 9999
        if about["version"] != 1 or not whole or not fits or min(s["temperature"] for s in self.sections) <= 0:
            raise ValueError("manifest.json and the files beside it do not belong together")

    def route(self, images: Any, threshold: float | None = None) -> tuple[Any, Any]:
        """Normalised images [B, 3, H, W] to log-probabilities [B, K] and the place of the section that answered [B]."""
        answers, places = np.zeros((len(images), len(self.classes)), np.float32), np.zeros(len(images), int)
        rows, total, seen, before = np.arange(len(images)), np.zeros(1), 0, np.full(len(images), -1)
        only = ort.RunOptions()
        only.only_execute_path_to_fetches = True  # a head that is not asked is not run
        for place, (part, session) in enumerate(zip(self.sections, self.sessions, strict=True)):
            last, asked = not part["passes"], part["asked"] or threshold is not None
            limit, leaves = part["threshold"] if threshold is None else threshold, np.full(len(rows), last)
            found = session.run([part["passes"]] * (not last) + [part["logits"]] * asked, {part["input"]: images}, only)
            if asked:  # a threshold of null becomes NaN, which no score reaches
                own = (raw := found[-1].astype("d") / part["temperature"]) - np.logaddexp.reduce(raw, 1, keepdims=True)
                total, seen = total + own, seen + 1
                answer, score = (own, own[:, 0]) if last else self.score(own, total / seen)
                leaves |= (score >= np.array(limit, float)) & ((answer.argmax(1) == before) | (not self.agreement))
                answers[rows[leaves]], places[rows[leaves]] = answer[leaves], place
                total, before = total[~leaves], answer.argmax(1)[~leaves]
            rows, images = rows[~leaves], found[0][~leaves]
            if not len(rows):
                break
        return answers, places

    def read(self, file: str) -> Any:
        from PIL import Image, ImageOps  # for reading files only

        image, whole, look = ImageOps.exif_transpose(Image.open(file)), self.look["input_size"][:0:-1], self.look
        if image.mode[0] in "IF" or max(image.size) > 100 * min(image.size):
            raise ValueError(f"{image.size}: more than 8 bits per channel, or a side over 100 times the other")
        size, first, large = image.size, look["resize"][::-1], max(image.size) > look["small"]
        sides = [max(own * s // o for s, o in zip(first, size, strict=True)) for own in size if large] or whole
        left, top = [round((side - own) / 2) for side, own in zip(sides, whole, strict=True)]  # the centre is seen
        image = image.convert("RGB").resize(sides, look["resample"]).crop((left, top, left + whole[0], top + whole[1]))
        return ((np.asarray(image, "f") / 255 - np.float32(look["mean"])) / np.float32(look["std"])).transpose(2, 0, 1)


if __name__ == "__main__":
    given, files = (sys.argv[2:3], sys.argv[3:]) if sys.argv[1:2] == ["--threshold"] else ([], sys.argv[1:])
    if not files or files[0].startswith("--"):
        sys.exit(sys.stderr.write("usage: python run.py [--threshold SHARE] IMAGE...\n") and 2)
    try:
        limit, network, failed = float(given[0]) if given else None, Network(pathlib.Path(__file__).parent), 0
        if limit is not None and not 0 <= limit <= 1:
            raise ValueError(f"--threshold {given[0]}: a number from 0 to 1 is expected")
    except Exception as error:
        sys.exit(sys.stderr.write(f"error: {type(error).__name__}: {error}\n") and 2)
    for file in files:
        try:
            (answer,), (place,) = network.route(network.read(file)[None], limit)
            label, exit, sure = network.classes[answer.argmax()], network.sections[place]["exit"], np.exp(answer.max())
            print(json.dumps({"file": file, "label": label, "exit": exit, "confidence": round(float(sure), 4)}))
        except Exception as error:
            why = "it is a folder; name the images in it" if pathlib.Path(file).is_dir() else error
            failed = sys.stderr.write(f"error: '{file}': {why}\n") and 2
    sys.exit(failed)
