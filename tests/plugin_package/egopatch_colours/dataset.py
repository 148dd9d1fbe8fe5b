"""Videos of one colour, named after it: `train_red_0.mp4` is a video of the training part."""

from egopatch.configs.schema import DataConfig
from egopatch.extract.datasets import PARTS, Clip, Dataset, DatasetError, Question
from egopatch.extract.datasets.records import answer_vocabulary

TEXT = "what colour is it?"


def load(data: DataConfig) -> Dataset:
    videos = sorted(data.root.glob("*.mp4"))
    if not videos:
        raise DatasetError([f"{data.root}: contains no video; expected files such as train_red_0.mp4"])
    clips = tuple(Clip(path.stem, path) for path in videos)
    questions = {
        part: tuple(
            Question(clip.clip_id, clip.clip_id, TEXT, clip.clip_id.split("_")[1], "open", ("colour",))
            for clip in clips
            if clip.clip_id.startswith(part)
        )
        for part in PARTS
    }
    answers = answer_vocabulary([question.answer for question in questions["train"]])
    return Dataset(clips, questions, answers, (TEXT,), data.split)
