"""How much memory a stage takes on one GPU, before there is one.

The real network is built on torch's meta device, where tensors have shapes and no content, and runs the real forward
and backward; every tensor that is alive is counted. What DeepSpeed holds beside it follows from its ZeRO-3 rules.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unified_rl.backbones import policy_files
from unified_rl.backbones.bagel import vae
from unified_rl.backbones.bagel.backbone import BagelBackbone
from unified_rl.backbones.bagel.config import BagelConfig
from unified_rl.backbones.bagel.context import Context
from unified_rl.backbones.bagel.drawing import Painter
from unified_rl.backbones.bagel.inputs import InputSettings
from unified_rl.backbones.bagel.loading import Weights
from unified_rl.backbones.bagel.model import LOGITS, BagelModel
from unified_rl.backbones.bagel.sequence import SpecialTokens, Text, pack
from unified_rl.backbones.base import Categorical, Sampling
from unified_rl.backbones.janus import VQ_BATCH, JanusBackbone, JanusForConditionalGeneration
from unified_rl.backbones.janus_sampling import guided
from unified_rl.config import ConfigError, RunConfig, checkpoint_path
from unified_rl.train.zero3 import load_ds_config

META = torch.device("meta")
# Hidden size, width of the MLPs, layers, heads of the public language models.
JANUS = {"janus-pro-1b": (2048, 5632, 24, 16), "janus-pro-7b": (4096, 11008, 30, 32)}
PUBLIC = {**dict.fromkeys(JANUS, "janus"), "bagel-7b": "bagel"}
# What drawing and its training never gather.
NOT_DRAWING = {
    "janus": ("model.vqmodel.", "model.vision_model.", "model.aligner.", "lm_head."),
    "bagel": ("vit_model.", "connector.", "vit_pos_embed.", "language_model.lm_head."),
}
SIZE = {"float32": 4, "bfloat16": 2}
MASTER, MOMENTS, SUMS = 4, 8, 4  # bytes a trained number: fp32 weight, Adam's two moments, sum of gradients
# While Adam steps: the gradient in one piece and the denominator, which torch computes in place on GPUs only.
STEP, STEP_ON_CPU = 8, 12
SUB_GROUP = 1_000_000_000  # numbers that DeepSpeed steps together
DEEPSPEED = {  # its own values where the configuration has none
    "reduce_bucket_size": 500_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
}


# ---- counting -----------------------------------------------------------------------------------------------------


class Counted(TorchDispatchMode):
    """Sums the bytes of all storages that are made inside and still alive; `peak` is the most at any moment."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in self.alive:
            return

        def gone(_: object) -> None:
            self.live -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


class _Flash(torch.autograd.Function):
    """The memory of attention by blocks: the output and one number a query are kept, never the matrix of scores."""

    @staticmethod
    def forward(ctx: Any, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        mixed = torch.empty_like(queries)
        ctx.save_for_backward(queries, keys, values, mixed, queries.new_empty(queries.shape[:3], dtype=torch.float32))
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextmanager
def _attention_by_blocks() -> Iterator[None]:
    # Not a TorchFunctionMode: those are off inside backward, where layers are recomputed.
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda queries, keys, values, *_, **__: _Flash.apply(queries, keys, values)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None  # DeepSpeed moves it to a buffer that is counted apart


def peak_bytes(module: nn.Module, work: Callable[[], torch.Tensor]) -> int:
    """Most bytes alive at once, besides the module's weights, while `work` and the backward of its result run."""
    trained = [p for p in module.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in trained]
    counted = Counted([*module.parameters(), *module.buffers()])
    with _attention_by_blocks(), counted:
        result = work()
        if result.requires_grad:
            result.backward()
    for hook in hooks:
        hook.remove()
    return counted.peak


# ---- networks without content -------------------------------------------------------------------------------------


@dataclass
class Network:
    """A model on the meta device and the size of its images.

    Attributes:
        grid: rows and columns of an image's cells; pixels: height and width.
        vae: BAGEL's autoencoder, None for Janus.
        reading_tokens: that an image takes in front of a question.
    """

    family: str
    model: nn.Module
    grid: tuple[int, int]
    pixels: tuple[int, int]
    reading_tokens: int
    vae: nn.Module | None = None

    @property
    def language(self) -> tuple[int, int, int]:
        """Layers, key-value heads, head size."""
        if self.family == "janus":
            c = self.model.config.text_config
            return c.num_hidden_layers, c.num_key_value_heads, c.hidden_size // c.num_attention_heads
        c = self.model.config.language
        return c.layers, c.kv_heads, c.head_size

    def count(self, chosen: Callable[[str], bool] = lambda name: True) -> int:
        """Number of weights whose name is chosen."""
        return sum(p.numel() for name, p in self.model.named_parameters() if chosen(name))

    def weight_bytes(self) -> int:
        """Of a whole copy, the autoencoder included."""
        parts = [*self.model.parameters(), *(self.vae.parameters() if self.vae else ())]
        return sum(p.numel() * p.element_size() for p in parts)

    def train(self, scope: str, lora: tuple[int, int], recompute: float) -> int:
        """Let the weights of `scope` require gradients, and recompute a share of the layers; their number."""
        kind = JanusBackbone if self.family == "janus" else BagelBackbone
        self.model.requires_grad_(False)
        if scope == "lora":
            policy_files.inject_lora(self.model, kind.lora_targets, *lora)
        dtype = next(p.dtype for name, p in self.model.named_parameters() if kind.trained_in_full(name))
        for name, parameter in self.model.named_parameters():
            if ("lora_" in name) if scope == "lora" else kind.trained_in_full(name):
                parameter.data = parameter.data.to(dtype)
                parameter.requires_grad_(True)
        if self.family == "bagel":
            self.model.enable_activation_checkpointing(recompute)
        else:
            JanusBackbone.recompute_layers(self.model, recompute)
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)


def network(model: str, dtype: str) -> Network:
    """By public name, folder, or `assets:NAME`.

    Raises:
        ConfigError: neither a public name nor a checkpoint folder.
    """
    folder = None if model in PUBLIC else checkpoint_path(model)
    kind = getattr(torch, dtype)
    if family_of(model) == "janus":
        return _janus(model, folder, kind)
    return _bagel(folder, kind)


def family_of(model: str) -> str:
    """janus or bagel."""
    if model in PUBLIC:
        return PUBLIC[model]
    config = checkpoint_path(model) / "config.json"
    kind = json.loads(config.read_text()).get("model_type")
    if kind not in ("janus", "bagel"):
        raise ConfigError(f"{config}: model_type is {kind!r}; give a folder of Janus or BAGEL, or {', '.join(PUBLIC)}")
    return kind


def _janus(model: str, folder: Path | None, dtype: torch.dtype) -> Network:
    from transformers import JanusConfig

    config = JanusConfig(**_janus_pro(*JANUS[model])) if folder is None else JanusConfig.from_pretrained(folder)
    config.tie_word_embeddings = False  # as when it is loaded
    with META:
        empty = JanusForConditionalGeneration._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    empty.to(dtype).eval()
    empty.model.vqmodel.float()  # kept in fp32, as when it is loaded
    side = config.vision_config.image_size
    grid = (side // config.vision_config.patch_size,) * 2
    return Network("janus", empty, grid, (side, side), grid[0] ** 2)


def _janus_pro(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "text_config": {
            "model_type": "llama", "vocab_size": 102400, "hidden_size": hidden, "intermediate_size": intermediate,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        },
        "vision_config": {
            "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 384,
            "patch_size": 16, "mlp_ratio": 4.0, "projection_dim": hidden, "depth": 2, "num_image_tokens": 576,
        },
        "vq_config": {
            "embed_dim": 8, "num_embeddings": 16384, "latent_channels": 256, "base_channels": 128,
            "channel_multiplier": [1, 1, 2, 2, 4], "num_res_blocks": 2, "projection_dim": hidden,
            "num_hidden_layers": 2, "image_token_embed_dim": hidden,
        },
    }  # fmt: skip


def _bagel(folder: Path | None, dtype: torch.dtype) -> Network:
    settings = InputSettings() if folder is None else InputSettings.from_folder(folder)
    config = BagelConfig()
    if folder is not None:
        config = BagelConfig.from_folder(folder, Weights.from_folder(folder).shapes)
    with META:
        model = BagelModel(config).to(dtype).eval()
        if folder is None:
            autoencoder = vae.empty_module((128, 256, 512, 512), 2, config.latent_channels)
        else:
            autoencoder = vae.module_of(Weights([folder / vae.WEIGHTS]))
    pixels = 2 ** (len(autoencoder.config.block_out_channels) - 1) * config.latent_patch
    grid = (settings.drawn[0] // pixels, settings.drawn[1] // pixels)
    longest = min(settings.longest, config.vision.side * config.vision.patch)
    scale = min(1.0, longest / max(settings.drawn))
    patches = [round(side * scale / config.vision.patch) for side in settings.drawn]
    return Network("bagel", model, grid, settings.drawn, patches[0] * patches[1] + 2, autoencoder)


# ---- passes -------------------------------------------------------------------------------------------------------


def drawing(net: Network, images: int, group: int, steps: int, prompt: int, guidance: bool) -> torch.Tensor:
    """A pass that replays the drawing of `images`; a scalar to differentiate.

    Args:
        group: images of one prompt, which is read once.
        steps: decisions of a flow in one pass.
        prompt: its tokens.
    """
    if net.family == "janus":
        return _token_drawing(net, images, prompt, guidance)
    painter = Painter(net.model, SpecialTokens(0, 0, 0, 0), *net.grid, META)
    prompts = -(-images // group)
    with torch.set_grad_enabled(False):
        context = _read(net, prompts, prompt)
    context = context.take(torch.arange(images * steps) // (group * steps))
    return _velocity(painter, context, images * steps, guidance)


def _velocity(painter: Painter, context: Context, rows: int, guidance: bool) -> torch.Tensor:
    x, times = torch.zeros(rows, *painter.shape, device=META), torch.zeros(rows, device=META)
    velocity = painter.velocity(painter.layout.tiled(context.next_position), context, x, times)
    if guidance:
        empty = Context.empty(rows)
        velocity = velocity + painter.velocity(painter.layout.tiled(empty.next_position), empty, x, times)
    return velocity.square().sum()


def _read(net: Network, rows: int, tokens: int) -> Context:
    # Prompts differ in length: padding makes attention take a mask, and copies of the keys that heads share.
    texts = [[Text([0] * (tokens - bool(row)))] for row in range(rows)]
    packed = pack(texts, net.model.config, SpecialTokens(0, 0, 0, 0))
    return net.model(packed.to(META), Context.empty(rows))[1]


def _token_drawing(net: Network, images: int, prompt: int, guidance: bool) -> torch.Tensor:
    model, rows, length = net.model, images * (2 if guidance else 1), net.grid[0] * net.grid[1]
    actions = torch.zeros(images, length, dtype=torch.long, device=META)
    text = model.get_input_embeddings()(torch.zeros(rows, prompt, dtype=torch.long, device=META))
    drawn = model.prepare_embeddings_for_image_generation(actions[:, :-1])
    hidden = _language(model, torch.cat([text, drawn.repeat(rows // images, 1, 1)], 1))
    settings = Sampling(guidance_scale=2.0 if guidance else 1.0)
    return _decisions(Categorical(guided(model.model.generation_head(hidden[:, prompt - 1 :]), settings)), actions)


def _decisions(distribution: Categorical, actions: torch.Tensor) -> torch.Tensor:
    log_probs = distribution.log_prob(actions)
    divergence = distribution.kl_to(log_probs, log_probs.detach())
    with torch.no_grad():
        distribution.entropy()
    return (log_probs + divergence).sum()


def _language(model: nn.Module, embeddings: torch.Tensor) -> torch.Tensor:
    rows, length = embeddings.shape[:2]
    mask = torch.ones(rows, 1, length, length, dtype=torch.bool, device=META)
    positions = torch.zeros(rows, length, dtype=torch.long, device=META)
    return model.model.language_model(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state


def reading(net: Network, images: int, question: int, answer: int) -> torch.Tensor:
    """A pass that scores an answer of so many tokens to a question on each of `images`."""
    length = net.reading_tokens + question + answer
    if net.family == "janus":
        side = net.pixels[0]
        pixels = torch.zeros(images, 3, side, side, device=META, dtype=net.model.lm_head.weight.dtype)
        features = net.model.model.get_image_features(pixels).pooler_output
        text = net.model.get_input_embeddings()(torch.zeros(images, question + answer, dtype=torch.long, device=META))
        hidden = _language(net.model, torch.cat([features.view(images, -1, text.shape[-1]), text], 1))
        logits = net.model.lm_head(hidden[:, -answer:]).float().flatten(0, 1)
    else:
        # The tower's patches as text: its own states are small beside those of the language model.
        packed = pack([[Text([0] * length)]] * images, net.model.config, SpecialTokens(0, 0, 0, 0)).to(META)
        hidden, context = net.model(packed, Context.empty(images))
        rows = min(images * answer, max(1, LOGITS // net.model.config.language.vocabulary))
        logits = net.model.logits(hidden.understanding[:rows]).float()
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=META))


def decoding(net: Network, images: int) -> torch.Tensor:
    """Pixels of `images`, as many at a time as the backbone decodes."""
    if net.family == "janus":
        tokens = torch.zeros(min(images, VQ_BATCH), net.grid[0] * net.grid[1], dtype=torch.long, device=META)
        return net.model.decode_image_tokens(tokens)
    factor = net.model.config.latent_patch
    size = (min(images, vae.BATCH), net.model.config.latent_channels, *(side * factor for side in net.grid))
    return net.vae.decode(torch.zeros(size, device=META)).sample


# ---- stages -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the peak of a stage."""

    weights: int
    gradients: int = 0
    optimizer: int = 0
    cache: int = 0
    activations: int = 0
    buffers: int = 0

    @property
    def peak(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.cache + self.activations + self.buffers


@torch.no_grad()
def rollout_memory(net: Network, config: RunConfig, prompt: int) -> Memory:
    """A whole copy of the weights draws `rollout.groups_per_batch` groups."""
    images = config.rollout.groups_per_batch * config.rollout.group_size
    rows = images * (2 if config.rollout.guidance_scale != 1 else 1)
    cells, (layers, heads, size) = net.grid[0] * net.grid[1], net.language
    columns = prompt + cells
    numbers = 2 * layers * heads * size * columns * (rows if net.family == "janus" else images)
    cache = numbers * SIZE[config.backbone.dtype]
    pixels = peak_bytes(net.vae or net.model, lambda: decoding(net, images))
    if net.family == "janus":
        drawn = rows * net.model.config.vq_config.num_embeddings * 8 * 3  # sampled in fp64
    else:
        drawn = peak_bytes(net.model, lambda: drawing(net, images, config.rollout.group_size, 1, prompt, rows > images))
    return Memory(net.weight_bytes(), cache=cache, activations=max(drawn, pixels))


@torch.no_grad()
def reward_memory(net: Network, config: RunConfig, prompt: int) -> Memory:
    """The judge scores `reward.batch_size` images; for GRPO it also replays them under the base weights."""
    images, flow = config.reward.batch_size, config.rollout.flow
    work = [peak_bytes(net.model, lambda: reading(net, images, prompt, prompt))]
    if config.policy.objective == "grpo":
        steps, guidance = flow.sde_window or flow.steps - 1, config.rollout.guidance_scale != 1
        work.append(
            peak_bytes(net.model, lambda: drawing(net, images, config.rollout.group_size, steps, prompt, guidance))
        )
    copies = 2 if config.reward.judge == "live" else 1
    return Memory(copies * net.weight_bytes(), activations=max(work))


def train_memory(net: Network, config: RunConfig, world_size: int, prompt: int) -> Memory:
    """One rank of `world_size` under ZeRO-3 at the larger of two peaks: backward of a micro-batch, optimiser step.

    `net` is changed: weights of the configured scope require gradients from now on.
    """
    settings = config.train
    recompute = settings.activation_checkpointing
    trained = net.train(settings.scope, (settings.lora.rank, settings.lora.alpha), recompute)
    micro, group = settings.micro_batch, config.rollout.group_size
    flow, policy = config.rollout.flow, config.policy
    decisions = flow.sde_window or (flow.sde_before or flow.steps - 1)
    steps = (policy.steps_per_update or decisions) if policy.objective == "grpo" else 1
    guidance = config.rollout.guidance_scale != 1 and policy.objective == "grpo"
    passes = peak_bytes(net.model, lambda: drawing(net, micro, group, steps, prompt, guidance))
    zero = load_ds_config(settings.ds_config, config.backbone.dtype, micro, 1, world_size, 1.0)["zero_optimization"]
    options = {name: zero.get(name, value) for name, value in DEEPSPEED.items()}
    size = SIZE[config.backbone.dtype]
    partitioned = sum(p.numel() * p.element_size() for p in net.model.parameters()) // world_size
    offload = {name: zero.get(f"offload_{name}", {}).get("device", "none") != "none" for name in ("optimizer", "param")}
    mine = 0 if offload["optimizer"] else trained // world_size
    bucket = options["reduce_bucket_size"] * size
    step = (STEP_ON_CPU if config.backbone.device == "cpu" else STEP) * min(mine, SUB_GROUP)
    gathered = _gathered(net, options) * size if world_size > 1 else 0
    outside = sum(p.numel() * p.element_size() for p in net.vae.parameters()) if net.vae else 0
    return Memory(
        weights=(0 if offload["param"] else partitioned) + outside,
        gradients=SUMS * mine,
        optimizer=(MASTER + MOMENTS) * mine,
        activations=max(passes, step - gathered),
        buffers=bucket + gathered,
    )


def _gathered(net: Network, options: dict[str, int]) -> int:
    """Numbers that a rank holds whole at once: weights stay gathered where the backward pass is near."""
    drawn = net.count(lambda name: not name.startswith(NOT_DRAWING[net.family]))
    largest = max(p.numel() for p in net.model.parameters())
    near = options["stage3_max_reuse_distance"] // 2 + options["stage3_prefetch_bucket_size"] + largest
    return min(drawn, near)
