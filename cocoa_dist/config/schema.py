"""Every field of a recipe with its type, default and meaning, in one frozen tree.

What a field may be is checked here, once; unknown fields are errors.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cocoa_dist.config.errors import nearest
from cocoa_dist.config.fields import NotNegative, Positive, Ratio, StageName, Strict
from cocoa_dist.config.model import ModelConfig
from cocoa_dist.config.objectives import STAGE_START, ContrastiveConfig, ObjectiveConfig

FROM_MODEL = "model"  # `init_from` of a stage that starts from the base model


class ImageConfig(Strict):
    """How pictures become patches. Pixels are counted after resizing (Qwen2-VL's rule)."""

    min_pixels: Positive = 32 * 32
    max_pixels: Positive = 32 * 32
    max_decoded_pixels: Positive = 100_000_000  # a larger picture is refused before decoding
    augment_shift: Ratio = 0.0  # largest shift, as a share of the side
    augment_brightness: Ratio = 0.0  # largest darkening, as a share
    cache_bytes: NotNegative = 256 * 2**20  # decoded pictures kept by each process


class ShuffleConfig(Strict):
    """The order of large data sets: blocks at random, records among a window's blocks.

    A data set of at most one window is shuffled as a whole. Numbers of nodes that divide `lanes`
    read no block twice.
    """

    block_records: Positive = 64  # neighbours that are read together
    window_blocks: Positive = 960  # a multiple of lanes
    lanes: Positive = 48

    @model_validator(mode="after")
    def _windows_have_whole_lanes(self) -> "ShuffleConfig":
        if self.window_blocks % self.lanes:
            raise ValueError(
                f"window_blocks {self.window_blocks} is not a multiple of lanes {self.lanes}"
            )
        return self


class DataConfig(Strict):
    """What all stages share about data."""

    tokens_per_pack: Positive = 8192
    patches_per_pack: Positive = 32768
    max_text_tokens: Positive = 48  # longer texts are cut, and counted
    image: ImageConfig = ImageConfig()
    shuffle: ShuffleConfig = ShuffleConfig()
    # Sources, batch_size or left_out that changed since a checkpoint: stop, or go on with the new
    # ones from where each data set stands, so that nothing is repeated or lost.
    on_change: Literal["refuse", "continue"] = "refuse"
    left_out: str | None = None  # JSON lines with dataset and number, as quarantine/ has them
    num_workers: NotNegative = 0  # loader processes a rank; 0 loads in the rank itself
    bad_record_limit: NotNegative = 100  # uses of unusable records a stage may have
    log_sample_ids: bool = False


class AttentionConfig(Strict):
    """The attention rule of a stage; see segments.py."""

    rule: Literal["bidirectional", "causal", "eos_bridged", "compression"] = "bidirectional"
    bridge_sees_target: bool = True
    target_causal: bool = False

    @model_validator(mode="after")
    def _options_belong_to_the_rule(self) -> "AttentionConfig":
        changed = not self.bridge_sees_target or self.target_causal
        if changed and self.rule != "eos_bridged":
            raise ValueError(
                f"bridge_sees_target and target_causal are options of eos_bridged, not {self.rule}"
            )
        return self

    def options(self) -> dict[str, bool]:
        """Return the options that `segments.attention_rule` takes for this rule."""
        if self.rule != "eos_bridged":
            return {}
        return {
            "bridge_sees_target": self.bridge_sees_target,
            "target_causal": self.target_causal,
        }


class SourceConfig(Strict):
    """One data set of a blend."""

    path: str  # folder of Arrow shards, or `asset:NAME`
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    limit: Positive | None = None  # use the first records only

    def num_records(self, available: int) -> int:
        """Return how many of its records are used."""
        return min(available, self.limit or available)

    def weight_of(self, num_records: int) -> float:
        """Return its weight beside the others'."""
        return self.weight


class BlendPartConfig(SourceConfig):
    """One data set of a metadataset, as it was found there."""

    share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0  # of its first records, or of `limit`
    repetitions: Annotated[float, Field(gt=0.0)] | None = None  # of blend_epochized

    def num_records(self, available: int) -> int:
        """Return how many of its records are used; rounded down as energon does."""
        return int(super().num_records(available) * self.share)

    def weight_of(self, num_records: int) -> float:
        """Return its weight; that of blend_epochized is in records."""
        return self.weight if self.repetitions is None else self.repetitions * num_records


class MetadatasetConfig(Strict):
    """A blend of energon's, and what it said when the recipe was loaded."""

    path: str  # a YAML file; a recipe gives it alone
    parts: Annotated[dict[str, BlendPartConfig], Field(min_length=1)]


class StageDataConfig(Strict):
    """Which records a stage sees and how a record becomes a sample."""

    sources: dict[str, SourceConfig] = Field(default_factory=dict)
    metadataset: MetadatasetConfig | None = None  # instead of sources: a blend as energon has it
    view: Literal["caption", "bridged", "language", "pair", "interleaved", "dialogue", "questions"]
    keywords: Literal["sample", "all", "none"] = "sample"
    image_share: Ratio = 1.0  # samples with a picture (`language`, `bridged`, `interleaved`)
    separate_views: bool = False  # `bridged`: one text in the context, another one as the target
    max_turns: Positive = 10  # of a dialogue that are used
    task_block: Positive | None = None  # records of one data set in a row; default: a whole step
    # In front of the query of a pair: one text, or one for each source.
    instruction: str | dict[str, str] = ""
    negatives: NotNegative = 0  # hard negatives of a record that join the candidates of all queries
    negatives_choice: Literal["first", "draw"] = "first"  # where a record has more

    @property
    def blend(self) -> Mapping[str, SourceConfig]:
        """The data sets by name, from wherever they were given."""
        return self.sources if self.metadataset is None else self.metadataset.parts

    @field_validator("sources", mode="before")
    @classmethod
    def _null_is_none(cls, value: object) -> object:
        return {} if value is None else value

    @model_validator(mode="after")
    def _one_blend(self) -> "StageDataConfig":
        if bool(self.sources) == (self.metadataset is not None):
            found = "both" if self.sources else "none"
            raise ValueError(
                f"give exactly one of `sources` and `metadataset`, found {found}; "
                "`sources=null` takes those of a recipe away"
            )
        return self

    @model_validator(mode="after")
    def _every_source_has_its_instruction(self) -> "StageDataConfig":
        if isinstance(self.instruction, dict) and self.instruction.keys() != self.blend.keys():
            unknown = sorted(self.instruction.keys() - self.blend.keys())
            missing = sorted(self.blend.keys() - self.instruction.keys())
            raise ValueError(
                f"instruction names {unknown or 'no source'} that is not in sources, and lacks "
                f"{missing or 'none'}: give one text for all, or one for each of "
                f"{', '.join(self.blend)} (empty for none)"
            )
        if self.negatives and self.view != "pair":
            raise ValueError(f"negatives belong to data.view pair, found {self.view}")
        return self

    def instruction_of(self, source: str) -> str:
        """Return what stands in front of the queries of a source."""
        if isinstance(self.instruction, str):
            return self.instruction
        return self.instruction[source]


class OptimizerConfig(Strict):
    """AdamW (arXiv 1711.05101) and its learning rate over the stage."""

    learning_rate: Annotated[float, Field(gt=0.0)]
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: NotNegative = 0
    betas: tuple[Ratio, Ratio] = (0.9, 0.98)
    eps: Annotated[float, Field(gt=0.0)] = 1.0e-8
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0


class AdapterConfig(Strict):
    """A low-rank adapter, trained instead of the weights and merged at the stage's end."""

    kind: Literal["lora", "dora"] = "lora"
    rank: Positive = 8
    alpha: Positive = 64
    dropout: Ratio = 0.0
    targets: Annotated[tuple[str, ...], Field(min_length=1)]


class StageConfig(Strict):
    """One stage: a rule, an objective, data, and how long."""

    init_from: str = FROM_MODEL  # `model` or an earlier stage
    attention: AttentionConfig = AttentionConfig()
    objective: ObjectiveConfig
    data: StageDataConfig
    batch_size: Positive  # records a step, over all ranks
    steps: Positive
    optimizer: OptimizerConfig
    adapter: AdapterConfig | None = None
    # What an embedding is: the bridge's last token, the mean over all tokens or over the bridge, or
    # the tokens of the bridge as several vectors, whose best matches are averaged.
    pooling: Literal["last", "mean", "compression", "late_interaction"] = "last"
    freeze_vision: bool = False

    @property
    def guide(self) -> str | None:
        """The frozen model that says what is no negative: `stage_start`, a folder, or none."""
        config = self.objective
        return config.guide if isinstance(config, ContrastiveConfig) else None

    @property
    def guide_folder(self) -> str | None:
        """The path of a guide that lies in a folder of its own."""
        return None if self.guide == STAGE_START else self.guide

    @property
    def reads_scores(self) -> bool:
        """Whether the objective follows a teacher's scores in the records."""
        config = self.objective
        return isinstance(config, ContrastiveConfig) and config.distillation_weight > 0

    @model_validator(mode="after")
    def _parts_fit(self) -> "StageConfig":
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(
                f"optimizer.warmup_steps is {self.optimizer.warmup_steps}, more than the "
                f"{self.steps} steps of the stage"
            )
        if self.data.task_block is not None and self.batch_size % self.data.task_block:
            works = [n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of data.task_block "
                f"{self.data.task_block}; it can be made of blocks of {', '.join(map(str, works))}"
            )
        views = {
            "reconstruction": ("caption", "bridged", "interleaved"),
            "next_token": ("language", "bridged", "dialogue", "questions"),
            "contrastive": ("pair",),
        }[self.objective.kind]
        if self.data.view not in views:
            raise ValueError(
                f"objective {self.objective.kind} needs data.view {' or '.join(views)}, "
                f"found {self.data.view}"
            )
        if self.reads_scores and not self.data.negatives:
            raise ValueError(
                "distillation_weight needs negatives to score beside the target: set data.negatives"
            )
        self._check_target()
        rule = self.attention
        hides = rule.rule in ("causal", "compression") or (
            rule.rule == "eos_bridged" and rule.target_causal and not rule.bridge_sees_target
        )
        if self.objective.kind == "next_token" and not hides:
            raise ValueError(
                "next-token targets would be seen before they are predicted: attention.rule must "
                "be causal, or eos_bridged with target_causal=true and bridge_sees_target=false"
            )
        return self

    def _check_target(self) -> None:
        """Refuse rules and options for a TARGET that the view does not write, or the reverse."""
        view, rule = self.data.view, self.attention.rule
        rules = {
            "bridged": ("eos_bridged", "compression"),
            "dialogue": ("compression", "eos_bridged", "causal"),
            "questions": ("compression", "eos_bridged", "causal"),
        }.get(view, ("bidirectional", "causal", "compression"))
        if rule not in rules:
            raise ValueError(
                f"data.view {view} and attention.rule {rule} do not belong together, expected "
                f"attention.rule {' or '.join(rules)} with this view"
            )
        if self.data.separate_views and view != "bridged":
            raise ValueError(f"data.separate_views is an option of view bridged, not of {view}")
        ratio = getattr(self.objective, "context_mask_ratio", 0.0)
        if ratio and view != "bridged":
            raise ValueError(
                f"objective.context_mask_ratio is {ratio}: only view bridged has a context beside "
                f"a target, found {view}"
            )


class EngineConfig(Strict):
    """What runs the step. The file in ds_configs/ holds mechanics only."""

    kind: Literal["deepspeed", "fsdp2"] = "deepspeed"  # ZeRO-3, or torch's fully_shard
    ds_config: str = "zero3_cpu"  # of deepspeed: a name in ds_configs/, or a path
    timeout_seconds: Positive = 600  # of a collective
    resident_parameters: Literal["auto"] | bool = "auto"  # every rank keeps all weights gathered
    reduction: Literal["coalesce", "boundary"] = "boundary"  # of a step's gradients, see engine.py


class GuardsConfig(Strict):
    """What is looked at while a stage runs; none of it changes a number."""

    preflight: bool = True  # before the first step: collective, largest pack, disk
    max_skipped_in_a_row: Positive = 10  # steps whose loss or gradient was not finite
    max_skipped: Positive = 100  # of them in a stage
    spike_window: NotNegative = 64  # steps a loss is compared with; 0: no comparison
    spike_deviations: Annotated[float, Field(gt=0.0)] = 8.0  # above the median, in robust sigmas
    watchdog: bool = True  # end a rank that makes no step within engine.timeout_seconds


class CheckpointConfig(Strict):
    """When checkpoints are written and how many stay."""

    every_steps: Positive = 100
    keep_last: Positive = 2  # of the running stage; stage ends always stay
    max_failed_saves: NotNegative = 3  # in a row; one more ends the run


class WandbConfig(Strict):
    """A run of Weights & Biases; offline until somebody syncs its folder."""

    project: Annotated[str, Field(min_length=1)]
    mode: Literal["offline", "online"] = "offline"


class MetricsConfig(Strict):
    """What is printed, and who gets to see it: Prometheus (exporter.py) and others (sinks.py)."""

    log_every_steps: Positive = 20
    measure_every_steps: Positive = 20  # norms and updates of groups of parameters, GPU memory
    tensorboard: bool = False  # event files in tensorboard/ of the run folder
    wandb: WandbConfig | None = None
    exporter: bool = True  # an endpoint for Prometheus in every rank and the launcher
    port: Annotated[int, Field(ge=0, le=65000)] = 0  # plus the local rank; 0: a free one
    bind_address: str = "auto"  # auto: loopback outside SLURM, else every interface
    targets: str | None = None  # folder of the file_sd targets; default: sd/ in the run folder
    heartbeat_seconds: Annotated[float, Field(ge=0.0, le=30.0)] = 15.0  # in events.jsonl
    linger_seconds: Annotated[float, Field(ge=0.0)] = 0.0  # of the launcher, after giving up


class EvaluationConfig(Strict):
    """Held-out retrieval: name to data set."""

    sets: dict[str, SourceConfig] = Field(default_factory=dict)
    batch_size: Positive = 128
    every_steps: NotNegative = 0  # while a stage trains, and at its end; 0: not while it trains
    keep_best: str | None = None  # measure whose best checkpoint of each stage stays

    @property
    def measures(self) -> list[str]:
        """What `keep_best` can name: fields of metrics.jsonl of which more is better."""
        return [f"held_out_recall/{name}" for name in self.sets]

    @model_validator(mode="after")
    def _the_measure_exists(self) -> "EvaluationConfig":
        if self.keep_best is None:
            return self
        if self.keep_best not in self.measures:
            raise ValueError(
                f"evaluation.keep_best: '{self.keep_best}' is not measured"
                f"{nearest(self.keep_best, self.measures)}; have: "
                f"{', '.join(self.measures) or 'nothing, evaluation.sets has no set'}"
            )
        if not self.every_steps:
            raise ValueError(
                "evaluation.keep_best needs evaluation.every_steps: nothing is measured while "
                "evaluation.every_steps is 0"
            )
        return self

    @model_validator(mode="after")
    def _something_to_score(self) -> "EvaluationConfig":
        if self.every_steps and not self.sets:
            raise ValueError(
                f"evaluation.every_steps is {self.every_steps}, but evaluation.sets has no set: "
                "name one, or set every_steps to 0"
            )
        return self


class ExportConfig(Strict):
    """What the exported folder says about itself."""

    prompts: dict[str, str] = Field(default_factory=dict)
    licence: str = ""


class ProfileConfig(Strict):
    """Steps of every stage that are traced, on all ranks."""

    first: Positive
    count: Annotated[int, Field(gt=0, le=100)] = 3


class RuntimeConfig(Strict):
    """Process settings."""

    threads: Positive = 1  # torch threads of a rank
    profile_steps: ProfileConfig | None = None  # into profile/ of the run folder


class RunConfig(Strict):
    """A run: stages in order, and what they share."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    method: str
    seed: NotNegative = 0
    model: ModelConfig
    data: DataConfig = DataConfig()
    stages: Annotated[dict[StageName, StageConfig], Field(min_length=1)]
    engine: EngineConfig = EngineConfig()
    guards: GuardsConfig = GuardsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    budget_gpu_hours: Annotated[float, Field(gt=0.0)] | None = None  # asked for; an alert warns

    @model_validator(mode="after")
    def _compiled_layers_have_no_adapters(self) -> "RunConfig":
        adapted = [name for name, stage in self.stages.items() if stage.adapter is not None]
        if self.model.compile_layers and adapted:
            raise ValueError(
                f"stage '{adapted[0]}' has an adapter, and model.compile_layers is true: ZeRO-3 "
                "gathers a compiled layer at once, and frees its frozen weights before the "
                "backward pass has read them; set model.compile_layers=false"
            )
        return self

    @model_validator(mode="after")
    def _pooled_tokens_are_there(self) -> "RunConfig":
        for name, stage in self.stages.items():
            if stage.pooling == "compression" and not self.model.num_learnt_tokens:
                raise ValueError(
                    f"stage '{name}': pooling compression is over learnt tokens, and the model has "
                    "none; set model.compression_tokens, or model.num_bridge_tokens above 1"
                )
            if stage.pooling == "late_interaction" and self.model.bridge_length < 2:
                raise ValueError(
                    f"stage '{name}': pooling late_interaction keeps the tokens of a bridge as "
                    "several vectors, and this model's has one; set model.num_bridge_tokens or "
                    "model.compression_tokens above 1"
                )
        return self

    @model_validator(mode="after")
    def _stages_start_from_earlier_ones(self) -> "RunConfig":
        earlier: list[str] = []
        for name, stage in self.stages.items():
            if stage.init_from != FROM_MODEL and stage.init_from not in earlier:
                have = ", ".join([FROM_MODEL, *earlier])
                raise ValueError(
                    f"stage '{name}': init_from '{stage.init_from}' is not an earlier stage of "
                    f"this recipe (have: {have})"
                )
            earlier.append(name)
        return self
