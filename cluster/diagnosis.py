"""From what was found to what is wrong, where, and what to do. Pure: no Ray, no file, no clock."""

from __future__ import annotations

from actors.examiner import DeviceView, Examination, ExaminedNode, GpuSight, PathSight, Silence
from actors.identity import SAME_CODE, Identity
from cluster.doctor import Checkup
from cluster.findings import Diagnosis, Notebook
from cluster.pools import EligiblePool, cpu_pool, gpu_pool, unmeasured_gpu_pool
from merge_core.adapter import CONFIG as ADAPTER_CONFIG
from merge_core.errors import counted
from merge_core.plan import MergePlan
from merge_core.reachable import InputSight
from merge_core.side_files import CONFIG
from merge_core.upload import MEMORY_REMEDY

NOT_FOR_LORA = frozenset({"transformers", "peft", "safetensors", "huggingface_hub"})
"""Libraries without which LoRA is merged and verified, up to ``--level load``: raymeld reads and
writes adapters and checkpoints itself. PEFT, which merges other tuners, needs them all."""

_OF_RAY = "ray::"
"""Ray calls the processes of its workers so, and so does nvidia-smi."""

_SAME_PLACE = "Mount one file system at this path on every node"


def diagnose(checkup: Checkup) -> Diagnosis:
    """Judge what was found."""
    book = Notebook()
    for node in checkup.nodes:
        _judge_answers(node, checkup.driver, book)
        if isinstance(node.examination, Examination):
            _judge_software(node.name, node.examination, checkup, book)
            _judge_devices(node, node.examination, checkup, book)
            _judge_room(node, node.examination, checkup, book)
    _judge_inputs(checkup, book)
    _judge_destination(checkup, book)
    _judge_scratch(checkup, book)
    for refusal in checkup.refusals:
        book.problem(refusal.where, refusal.what, refusal.remedy)
    _note_the_rest(checkup, book)
    return book.close()


def visible_gpus(node: ExaminedNode, found: Examination) -> list[GpuSight]:
    """The GPUs of a machine that Ray, or without it this process, was given as a whole."""
    if in_slices(node, found):
        return []
    if node.ray_gpus and found.view.visible == "":  # Ray may hide all from who was given none
        return list(found.gpus)
    return [sight for sight in found.gpus if sight.gpu.is_visible(found.view.visible)]


def in_slices(node: ExaminedNode, found: Examination) -> bool:
    """Whether it was given slices of GPUs (MIG); nothing tells of which ones."""
    return any("MIG-" in (view.visible or "") for view in (found.view, *_views(node)))


def room_on_gpu(plan: MergePlan, found: Examination, sight: GpuSight) -> EligiblePool:
    """How a worker would fit on a GPU."""
    return gpu_pool(plan, found.memory, sight.gpu, sight.processes)


def _judge_answers(node: ExaminedNode, driver: Identity, book: Notebook) -> None:
    if node.leaves_in is not None:
        book.note(node.name, "is about to leave the cluster", "It was not examined")
    match node.examination:
        case Identity() as stranger:
            book.problem(node.name, stranger.difference(driver) or "has other code", SAME_CODE)
        case Silence(kind="late", reason=reason):
            remedy = "See Ray's logs there; give it longer with --timeout, or take the node away"
            book.problem(node.name, f"no examiner came up: {reason}", remedy)
        case Silence(kind="raised", reason=reason):
            book.problem(node.name, f"no worker can start there: {reason}", SAME_CODE)
        case Silence(reason=reason):
            remedy = "See Ray's logs there; workers also die that send a token where none is known"
            book.problem(node.name, f"its examiner died: {reason}", remedy)
    if isinstance(node.paths, Silence):
        remedy = "A mount whose server is gone hangs whoever looks: try ls on the paths there"
        what = f"BASE, ADAPTER and OUT cannot be looked at: {node.paths.reason}"
        book.problem(node.name, what, remedy)


def _judge_software(name: str, found: Examination, checkup: Checkup, book: Notebook) -> None:
    difference = found.identity.difference(checkup.driver)
    if difference:
        book.problem(name, difference, SAME_CODE)
    if not found.libraries:
        remedy = "What raymeld depends on was not checked"
        book.note(name, "runs raymeld from a checkout, without its metadata", remedy)
    for library in found.libraries:
        if library.fits:
            continue
        there = f"is {library.found}" if library.found else "is missing"
        what = f"{library.name} {there}, and should be {library.wanted or 'there'}"
        if library.name in NOT_FOR_LORA:
            others = "other tuners (docs/adapters.md), --level load and the demo may not"
            book.note(name, what, f"LoRA is merged without it; {others}")
        else:
            book.problem(name, what, "Install raymeld there with all that it depends on")
    if not found.view.loads:
        what = f"torch cannot be imported: {found.view.trouble}"
        book.problem(name, what, "Install it again there")


def _judge_devices(
    node: ExaminedNode,
    found: Examination,
    checkup: Checkup,
    book: Notebook,
) -> None:
    visible, slices = visible_gpus(node, found), in_slices(node, found)
    if hidden := 0 if slices else len(found.gpus) - len(visible):
        what = f"CUDA_VISIBLE_DEVICES={found.view.visible} hides {counted(hidden, 'GPU')}"
        book.note(node.name, what, "Nothing is merged on these")
    for view in node.views:
        _judge_gpu_worker(node, view, book)
    if node.taken:
        what = f"GPUs are taken by other actors: {node.taken} of {node.ray_gpus}"
        book.note(node.name, what, "No worker could look at them; a merge waits for them")
    if checkup.on_ray and len(visible) > node.ray_gpus:
        what = f"Ray hands out {node.ray_gpus} of its {counted(len(visible), 'GPU')}"
        book.note(node.name, what, f"Start Ray there with --num-gpus={len(visible)} to use all")
    if not checkup.on_ray and visible and found.view.loads and found.view.device is None:
        what = f"torch cannot use its {counted(len(visible), 'GPU')}: {found.view.trouble}"
        book.note(node.name, what, "A merge here runs on the CPU; GPUs need a torch with CUDA")
    if slices:
        book.note(
            node.name, "its workers get slices of GPUs (MIG)", "How full they are is not known"
        )
    elif not found.gpus and any(view.device for view in (found.view, *_views(node))):
        book.note(node.name, "nvidia-smi tells nothing", "How full its GPUs are is not known")


def _views(node: ExaminedNode) -> list[DeviceView]:
    """Of workers that were given a GPU."""
    return [view for view in node.views if isinstance(view, DeviceView)]


def _judge_gpu_worker(node: ExaminedNode, view: DeviceView | Silence, book: Notebook) -> None:
    if isinstance(view, Silence) and view.kind == "waiting":
        book.note(node.name, f"a GPU was not looked at: {view.reason}", "A merge waits for it")
        return
    if isinstance(view, Silence):
        what, remedy = f"a worker with a GPU did not come up: {view.reason}", "See Ray's logs there"
        book.problem(node.name, what, remedy)
        return
    if view.loads and view.device is None:
        what = f"Ray hands out GPUs that torch cannot use: {view.trouble}"
        remedy = "Install a torch with CUDA there, or a driver that it accepts"
        book.problem(node.name, what, f"{remedy}; or start Ray there with --num-gpus=0")
    if node.ray_gpus > 1 and (view.visible is None or "," in view.visible):
        what = "a worker that was given one GPU sees all, and all workers would take the first"
        remedy = "Start Ray there without RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"
        book.problem(node.name, what, remedy)


def _judge_room(node: ExaminedNode, found: Examination, checkup: Checkup, book: Notebook) -> None:
    """Whether workers fit on the devices that they would take."""
    plan = checkup.plan
    if plan is None:
        return
    on_gpus = node.ray_gpus > 0 if checkup.on_ray else found.view.device is not None
    gpus = visible_gpus(node, found) if on_gpus else []
    for sight in gpus:
        _judge_gpu(node, sight, room_on_gpu(plan, found, sight), book)
    if not gpus and (on_gpus or node.ray_cpus or not checkup.on_ray):
        room = (unmeasured_gpu_pool if on_gpus else cpu_pool)(plan, found.memory)
        if not room.eligible:
            book.problem(node.name, room.reason, "Stop what else runs there, or take more memory")


def _judge_gpu(node: ExaminedNode, sight: GpuSight, room: EligiblePool, book: Notebook) -> None:
    if room.eligible:
        return
    place = f"{node.name}, GPU {sight.gpu.index}"
    actors = [process for process in sight.processes if process.name.startswith(_OF_RAY)]
    if node.taken and actors and len(actors) == len(sight.processes):
        book.note(place, room.reason, "Ray hands it out when these actors have ended")
    else:
        remedy = "Stop what else runs there, or start Ray with a CUDA_VISIBLE_DEVICES without it"
        book.problem(place, room.reason, remedy)


def _judge_inputs(checkup: Checkup, book: Notebook) -> None:
    remedy = _SAME_PLACE if checkup.on_ray else "Check the path and its permissions"
    unplanned = checkup.plan is None and not checkup.refusals  # which would say it better
    for number, driver in enumerate(checkup.inputs):
        kind, config = ("ADAPTER", ADAPTER_CONFIG) if number else ("BASE", CONFIG)
        named = f"{kind} {driver.path}"
        sights = {node.name: paths.inputs[number] for node, paths in _looked(checkup)}
        if checkup.on_ray:
            sights = {"the driver": driver, **sights}
        for name, sight in sights.items():
            if sight.error:
                book.problem(name, f"{named} cannot be read: {sight.error}", remedy)
            elif unplanned and sight.lacks(config) and driver.lacks(config):
                book.problem(name, f"{named} has no {config}", remedy)
            elif not driver.error:
                _compare(name, named, sight, driver, book)


def _compare(place: str, named: str, sight: InputSight, driver: InputSight, book: Notebook) -> None:
    """An input with what the driver sees under its path."""
    if difference := sight.difference(driver):
        remedy = f"{_SAME_PLACE}, or copy it there with its times (rsync -a)"
        book.problem(place, f"{named} {difference}", remedy)
    elif difference := sight.side_difference(driver):
        book.note(place, f"{named} {difference}", "No worker reads such files")


def _judge_destination(checkup: Checkup, book: Notebook) -> None:
    destination = checkup.destination
    if destination is None:
        return
    if destination.refusal is not None:
        refusal = destination.refusal
        what = f"{destination.named.partition(' ')[0]} cannot be written: {refusal.what}"
        book.problem(refusal.where, what, refusal.remedy)
    remedy = f"{_SAME_PLACE}, writable for the user that Ray runs as"
    for node, paths in _looked(checkup):
        if paths.refusal:
            what = f"{destination.named} cannot be written: {paths.refusal}"
            book.problem(node.name, what, remedy)
        elif not node.arrived:
            what = f"{destination.named}: the driver does not see what is written there"
            book.problem(node.name, what, remedy)


def _judge_scratch(checkup: Checkup, book: Notebook) -> None:
    """Where each node keeps what is to be sent to the hub."""
    sizes = () if checkup.plan is None else (shard.size for shard in checkup.plan.shards)
    largest = max(sizes, default=0)
    for node, paths in _looked(checkup):
        sight = paths.scratch
        if sight is None:
            continue
        if sight.refusal is not None:
            what = f"the scratch {sight.folder} cannot be used: {sight.refusal.what}"
            book.problem(node.name, what, sight.refusal.remedy)
        elif sight.room is not None and sight.room < largest:
            what = f"the scratch {sight.folder} has room for {sight.room / 1e9:.2f} GB"
            remedy = "Free space there, give another --scratch, or a smaller --shard-size"
            book.problem(
                node.name, f"{what}, and the largest file takes {largest / 1e9:.2f} GB", remedy
            )
        if sight.memory:
            book.note(node.name, f"the scratch {sight.memory}", MEMORY_REMEDY)


def _note_the_rest(checkup: Checkup, book: Notebook) -> None:
    where = f"--address {checkup.address}"
    if checkup.token is False:
        remedy = "Whoever reaches its ports runs code on every node: give it a token"
        book.note(where, "the cluster asks for no token", remedy)
    if checkup.on_ray and not any(node.ray_cpus or node.ray_gpus for node in checkup.nodes):
        remedy = "Those that an autoscaler starts can be examined once they are up"
        book.note(where, "no node has a CPU or a GPU for workers", remedy)
    for problem in checkup.notes:
        book.note(problem.where, problem.what, problem.remedy)
    for note in checkup.plan.notes if checkup.plan is not None else ():
        book.note("plan", note)


def _looked(checkup: Checkup) -> list[tuple[ExaminedNode, PathSight]]:
    return [(node, node.paths) for node in checkup.nodes if isinstance(node.paths, PathSight)]
