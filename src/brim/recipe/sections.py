"""The sections of a recipe: every key is a field here, its kind a `Literal`, its default the dataclass's."""

from dataclasses import dataclass
from typing import Literal

Method = Literal["full", "lora", "qlora", "qat"]
Task = Literal["causal-lm", "seq2seq-lm", "masked-lm", "sequence-classification"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    weights: Literal["fp32", "bf16", "fp16", "int8", "nf4", "int4"] = "bf16"
    """As stored on the device. Packed ones (int8, nf4, int4) are a frozen base's linear layers; embeddings, norms and
    head stay in the compute format."""
    compute: Literal["fp32", "bf16", "fp16"] = "bf16"
    """What matmuls run in."""
    master: Literal["fp32", "none"] = "none"
    """Copy of the trainable weights that the optimizer keeps and updates."""
    double_quant: bool = True
    """The scales of nf4's blocks are themselves held in 8 bits (QLoRA's double quantization)."""
    group_size: int = 128
    """Inputs that share a scale of int4 weights."""

    @property
    def packed(self) -> bool:
        """Whether the base's linear layers are held in a format that no matmul runs in."""
        return self.weights in ("int8", "nf4", "int4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    name: Literal["adamw", "adamw8bit", "adafactor", "sgd", "lion"] = "adamw"
    """States beside each weight: adamw two of its size, adamw8bit two of a byte an element, sgd (momentum 0.9) and lion
    one of its size, adafactor a row and a column.
    Their learning rates differ: sgd's is often 100 times adamw's, lion's a third to a tenth."""
    learning_rate: float = 2e-5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """How BF16 weights without an FP32 copy take an update: one below half their step is lost, or taken by chance."""
    in_backward: bool = False
    """Each weight is stepped as soon as backward has its gradient, which is then freed: all never exist at once. Needs
    grad_accumulation = 1 and max_grad_norm = 0, which want them all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What blocks recompute in backward: nothing, all but their linears' results, or everything from their input on."""
    loss: Literal["full", "chunked"] = "full"
    attention: Literal["eager", "sdpa", "flash"] = "sdpa"
    """sdpa takes the best kernel that can run, which may keep all scores; flash takes FlashAttention or refuses."""
    offload: Literal["none", "optimizer", "activations", "weights", "all"] = "none"
    """What is in the host's memory. optimizer: its states and copies of the weights, which are stepped there.
    activations: what blocks keep for backward. weights: those of blocks, fetched when a block runs and stepped on the
    host, and all that the optimizer has. all: weights and activations."""

    @property
    def offloads_optimizer(self) -> bool:
        return self.offload in ("optimizer", "weights", "all")

    @property
    def offloads_weights(self) -> bool:
        return self.offload in ("weights", "all")

    @property
    def offloads_activations(self) -> bool:
        return self.offload in ("activations", "all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    epochs: int = 1
    max_steps: int = 0
    """Ends the run earlier or later than `epochs` would; 0 leaves it to `epochs`."""
    warmup_steps: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    save_every: int = 0
    """Steps between checkpoints; 0: only when the run is interrupted."""
    evaluate_every: int = 0
    """Steps between evaluations; 0: only at the end, when evaluation data is given."""
    on_spike: Literal["tell", "stop", "rollback"] = "tell"
    """What a loss far above those before it brings (training/setbacks.py): a word; the end; or a step back to the last
    checkpoint, and on without the rows of that step. One that is no number ends the run unless it goes back."""
    seed: int = 0
    packing: bool = False
    """Whole examples share a row and do not see each other; otherwise texts follow each other, cut where a row ends."""
    learn: Literal["answers", "all"] = "answers"
    """Of what has a prompt: its completion (of a conversation, each turn of the assistant) or everything."""
    chat_template: Literal["own", "chatml"] = "own"
    """How conversations are written: by the tokenizer's own template, or by ChatML, which is then saved with it."""
    pairs_as_chat: bool = False
    """Prompt and completion are written as a conversation; otherwise one after the other, with a line end between."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    """Share of an adapter's inputs that are zeroed in training; each adapted layer then keeps a copy and a mask."""
    targets: tuple[str, ...] = ("all-linear",)
    rslora: bool = False
    """Adapters are scaled by alpha / sqrt(rank) instead of alpha / rank, so that a high rank still learns (rsLoRA)."""
    dora: bool = False
    """Each output's length is learned apart from its direction (DoRA): slower, and one more copy of adapted weights."""

    @property
    def factor(self) -> float:
        """What an adapter's product is scaled by."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class Qat:
    format: Literal["int8", "int4", "int3", "int2"] = "int4"
    """What the linear layers' weights are rounded to, as they are used in training and as they are saved."""
    granularity: str = "group:32"
    """Which weights share a scale: tensor, channel, or group:SIZE."""
    start: Literal["absmax", "mean", "least-squares", "calibrated"] = "absmax"
    """Scales to begin with: the largest weight is the last code; 2 mean|w| / sqrt(last code), LSQ's own; the least
    squared error; or the least error of what layers give on the run's first rows, where weights, too, make up for what
    others lose by rounding (GPTQ's error feedback, for decoders that run block by block)."""
    exact_share: float = 0.0
    """Of the steps, the first so many round nothing; scales then start from the weights that were learned."""
    activations: Literal["none", "int8"] = "none"
    """int8: the linear layers' inputs are rounded, too, each token's by its own largest value."""
    train: Literal["all", "adapters", "scales"] = "all"
    """adapters: every weight stays as it is, and an update of [lora]'s rank is added before it is rounded, so that the
    saved integers have it in them. scales: only the scales are learned."""
    teacher_top: int = 0
    """As many of each token's likeliest successors, by the model before training in full precision, are learned from
    beside the data; found once, before the first step. 0: none."""
    teacher_share: float = 0.5
    """Of the target, where there is a teacher; the rest is the data's own next token."""
    scale_rate: float = 1.0
    """The scales' learning rate, as a multiple of optimizer.learning_rate."""

    @property
    def bits(self) -> int:
        return int(self.format.removeprefix("int"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """Whose code runs: Brim's own, or other libraries' way of the same step, to compare with a run of theirs."""

    loss: Literal[
        "brim", "transformers-16bit", "transformers-4.40", "transformers-4.46", "transformers-4.50", "held",
        "litgpt", "litgpt-first", "litgpt-full", "torchtune",
    ] = "brim"  # fmt: skip
    """What each holds is said in training/generations.py."""
    cross_entropy: Literal["operators", "in-place", "fused"] = "operators"
    """in-place: one kernel that writes the logits' gradient over them (unsloth, fms-acceleration); fused: beside them
    (what torch.compile makes of it)."""
    adamw: Literal["fused", "foreach"] = "fused"
    """foreach is PyTorch's default on a GPU: its temporaries are as large as the parameters."""
    adapters: Literal["weights", "fp32"] = "weights"
    """Format of adapters: of the weights, or FP32 (PEFT's `autocast_adapter_dtype`, its default)."""
    frozen: Literal["compute", "fp32", "fp32-norms"] = "compute"
    """Format of what a packed base keeps unpacked (embeddings, norms, head): the compute format; FP32, as PEFT's
    `prepare_model_for_kbit_training` casts it; or FP32 for norms alone, as TRL's `peft_module_casting_to_bf16` leaves
    it after that: each residual and what is kept of it is then FP32, too."""
    model: Literal["transformers", "litgpt"] = "transformers"
    """litgpt: its one decoder for all families and its own adapters (training/litgpt.py), with random weights alone;
    lora.targets are then query, key, value, projection, mlp, head."""
    autocast: bool = False
    """As transformers' Trainer runs with `bf16` or `fp16`: forward is under autocast whatever the weights' format
    (accelerate 1.0, accelerator.py, prepare_model), and the logits that it returns are FP32 (its
    `convert_outputs_to_fp32`)."""
    cache: Literal["none", "kept"] = "none"
    """kept: what each block makes of its queries, keys and values lives until the loss is there: GPTBigCode of
    transformers 4 returns it under checkpoints, too (modeling_gpt_bigcode.py, `presents`)."""
    packed: Literal["brim", "bitsandbytes-0.42"] = "brim"
    """bitsandbytes-0.42: a product's node keeps its input as long as the graph, and unpacks by way of FP16."""
    norm: Literal["operators", "fused"] = "operators"
    """fused: RMS norms keep their input as it is and one number a row, as Liger's and unsloth's kernels do."""
    rotary: Literal["operators", "in-place"] = "operators"
    """in-place: queries and keys are turned where they lie, and their gradients, as unsloth's kernel does."""
    angles: Literal["elementwise", "product"] = "elementwise"
    """Of the rotary embedding. product: transformers 4 makes them by a matrix product, the first of a step."""
    heads: Literal["grouped", "repeated"] = "grouped"
    """repeated: keys and values are there for each query head until the block's attention is done, as in transformers'
    Mistral and Mixtral to 4.47."""
    checkpoints: Literal["brim", "reentrant"] = "brim"
    """reentrant: what transformers 4 asks for unless it is told otherwise: a block's output lives while its backward
    runs (training/checkpointing.py)."""
    activation: Literal["operators", "fused"] = "operators"
    """fused: gated feed-forwards keep gate and up and nothing between, as Liger's kernel and torch.compile do."""
    sharding: Literal["fsdp2", "fsdp1"] = "fsdp2"
    """fsdp1: beside adapters, no block is gathered ahead in backward (training/sharding.py says why), and what a block
    is run again from, and its gradient, stay until backward ends (training/checkpointing.py)."""
    adapter_units: Literal["own", "none"] = "own"
    """Of FSDP1: each adapter's matrix is gathered and reduced as a unit of its own (peft.utils.other,
    fsdp_auto_wrap_policy), which takes the host's time; none: adapters are left out of it, and whole on each device
    (fms-acceleration's fused kernels, `ignore_modules_in_fsdp`)."""
    accumulation: Literal["reduced", "whole"] = "reduced"
    """Of sharded devices, the gradients of micro-batches before the last. whole: they are not reduced, and each unit
    keeps one of all its parameters, of frozen ones, too: FSDP1 under `no_sync` (lightning's Fabric)."""

    @property
    def has_litgpt_loss(self) -> bool:
        """litgpt's own loss, whichever of its scripts calls it."""
        return self.loss.startswith("litgpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    nodes: int = 1
    devices_per_node: int = 1
    sharding: Literal["none", "ddp", "zero1", "zero2", "zero3", "hsdp"] = "none"
    """What is divided among the devices that see different rows: nothing (ddp), the optimizer's states (zero1), also
    gradients (zero2), also weights (zero3), or all that within a node, with copies across nodes (hsdp)."""
    tensor: int = 1
    """Devices that share each matrix, and see the same rows."""
    pipeline: int = 1

    @property
    def devices(self) -> int:
        """All of them: a process each."""
        return self.nodes * self.devices_per_node

    @property
    def data_ranks(self) -> int:
        """Devices (or groups of `tensor` devices) that see different rows."""
        return max(1, self.devices // (self.tensor * self.pipeline))

    @property
    def divides_weights(self) -> bool:
        """A block's weights are gathered when they are needed; else each device (or group) has all of them."""
        return self.sharding in ("zero2", "zero3", "hsdp")

    @property
    def copies_weights(self) -> bool:
        """Devices that see different rows have a copy of the weights each."""
        return self.sharding in ("ddp", "zero1")

    @property
    def state_shards(self) -> int:
        """Devices that share one copy of the optimizer's states."""
        if self.sharding in ("none", "ddp"):
            return 1
        return max(1, self.data_ranks // (self.nodes if self.sharding == "hsdp" else 1))
