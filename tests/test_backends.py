"""One code on every backend: the same network, losses that agree, models that travel, a batch shared by devices."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import test_training as toys

from lungct import training

HERE = os.path.dirname(__file__)
PRELUDE = f"""
import json, os, sys
sys.path.insert(0, {HERE!r})
import numpy as np
import test_training as t
from lungct import training
one_step = t.quick(epochs=1, batch_size=4, augmented=False, transplants=0)
few = t.toys(4)
"""
STEP = PRELUDE + """
folder, out = sys.argv[1:]
network, facts = training.load_model(folder)
first = training.predict(network, few.ct_hu)
history = training.fit(network, few, few, one_step)
t.saved(network, training.Path(out))
last = training.predict(network, few.ct_hu)
print("said", json.dumps({"backend": training.keras.backend.backend(), "loss": history.loss[0],
                          "val_loss": history.val_loss[0], "heat": [float(p.heat.max()) for p in first],
                          "subtype": [p.probabilities.tolist() for p in first],
                          "later": [float(p.heat.max()) for p in last]}))
"""
# one device makes three epochs; two take up its state after the second, and make the third
SHARED = PRELUDE + """
settings = t.quick(epochs=3, batch_size=2, learning_rate=0.01, transplants=0)
folder = training.Path(sys.argv[1])
def run(devices):
    with training.on_devices(devices):
        training.reproducible(0)
        network, seen = training.build_network(16, "AG", (8,), dropout=0), []
        history = training.fit(network, few, few, settings, folder, lambda row: seen.append(row["epoch"]))
        return history.iloc[-1][["loss", "val_loss"]].tolist(), network.get_weights(), training._sharing(), seen
one = run(1)
max(folder.glob("*.npz")).unlink()
two = run(2)
try:
    with training.on_devices(0):
        training.fit(t.network(), few, None, t.quick(batch_size=3))
except training.runs.InputError as error:
    refused = str(error)
apart = max(float(np.abs(a - b).max()) for a, b in zip(one[1], two[1], strict=True))
print("said", json.dumps({"losses": [one[0], two[0]], "apart": apart, "devices": [one[2], two[2]], "made": two[3],
                          "refused": refused}))
"""
# gradients of half precision: nobody's are infinite, then those of the first device, then those of the second
OVERFLOW = PRELUDE + """
import tensorflow as tf
with training.on_devices(2):
    network = training.build_network(16, "AG", (8,), precision="mixed_float16")
    trainer = training._trainer(network, t.quick())
    @tf.function
    def step(bad):
        def each():
            here = tf.distribute.get_replica_context().replica_id_in_sync_group
            some = tf.where(here == bad, float("inf"), 1.0)
            trainer.optimizer.apply([some + tf.zeros(v.shape) for v in trainer.trainable_variables])
        tf.distribute.get_strategy().run(each)
    seen = []
    for bad in (9, 0, 1, 9):
        step(tf.constant(bad))
        seen.append([float(trainer.optimizer.dynamic_scale.numpy()), *map(float, network.get_weights()[0].ravel()[:2])])
print("said", json.dumps(seen))
"""
FREED = PRELUDE + """
import gc, weakref
gc.disable()
unit = training._unit(2 * training.keras.Variable(np.ones((4, 16), "float32")).value)
training.ops.sum(unit).backward()
gone = weakref.ref(unit)
del unit
print("said", json.dumps(gone() is None))
"""
# what a reader does with plain lists and NumPy arrays, and a map of activations that can be told by hand
BY_HAND = PRELUDE + """
import keras
from lungct import evaluation
seen = training.ops.convert_to_numpy(training.normalise([-1000, -300], [2.5, np.nan]))
box = np.zeros((1, 2, 2, 2, 7), "float32")
box[0, 0, 0, 0, 6] = 1
losses = [float(training.box_loss(box, box[..., :6] + 0.25)[0]),
          float(training.subtype_loss(np.eye(4, dtype="float32")[:1], np.full((1, 4), 0.25, "float32"))[0])]
entrance = keras.Input((4, 4, 4, 1))
network = keras.Model(entrance, {"out": keras.layers.Rescaling(2.0, name="doubled")(entrance)})
ramp = np.arange(64, dtype="float32").reshape(1, 4, 4, 4, 1)
try:
    seen_by = evaluation.activation_map(network, ramp, lambda given: keras.ops.sum(given["out"][:, :2]), "doubled")
    maps = seen_by.tolist()
except training.runs.InputError as error:
    maps = str(error)
print("said", json.dumps({"seen": seen.tolist(), "losses": losses, "maps": maps}))
"""
TINY = {"phantom_patients": "14", "grid_size": "32", "grid_spacing_mm": "12", "epochs": "2", "predecessor_epochs": "1",
        "filters": "8 16", "bootstrap_samples": "100"}
LOGICAL = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
"""


def python(backend, *words, timeout=300, **environment):
    """What another process says, on the CPU and with this backend."""
    quiet = {"KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, timeout=timeout,
                          env=os.environ | quiet | environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def child(backend, code, *arguments, **environment):
    done = python(backend, "-c", code, *arguments, **environment)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("said ")).removeprefix("said "))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A model without dropout, and what one step of training on it comes to in this process."""
    folder = tmp_path_factory.mktemp("start")
    training.reproducible(0)
    network = training.build_network(16, "AG", (8, 16), dropout=0)
    toys.fill_head(network)
    toys.saved(network, folder)
    few = toys.toys(4)
    first = training.predict(network, few.ct_hu)
    settings = toys.quick(epochs=1, batch_size=4, augmented=False, transplants=0)
    return folder, first, training.fit(network, few, few, settings).iloc[0]


def installed(backend, extra):
    absent = importlib.util.find_spec(backend) is None
    return pytest.param(backend, marks=pytest.mark.skipif(absent, reason=f"no {backend}: pip install -e '.[{extra}]'"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", [installed("jax", "jax"), installed("torch", "bench")])
def test_another_backend_takes_the_same_step(backend, reference, tmp_path):
    folder, first, row = reference
    said = child(backend, STEP, folder, tmp_path)
    assert said["backend"] == backend
    assert np.allclose(said["heat"], [p.heat.max() for p in first], atol=1e-5)  # a model of TensorFlow, elsewhere
    assert np.allclose(said["subtype"], [p.probabilities for p in first], atol=1e-5)
    assert said["loss"] == pytest.approx(row.loss, rel=1e-4)
    assert said["val_loss"] == pytest.approx(row.val_loss, rel=1e-3) and abs(row.val_loss - row.loss) > 1e-3
    back, _ = training.load_model(tmp_path)  # and a model of the other backend here
    assert np.allclose(said["later"], [p.heat.max() for p in training.predict(back, toys.toys(4).ct_hu)], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", installed("jax", "jax"), installed("torch", "bench")])
def test_lists_and_arrays_are_taken_on_every_backend(backend):
    said = child(backend, BY_HAND)
    assert np.allclose(said["seen"], [[0, 0, 0.25, 1], [0.5, 0, 0, 0]])
    assert np.allclose(said["losses"], [0.25, np.log(4)])
    if backend == "jax":
        assert said["maps"] == "the backend is jax, and activation maps need tensorflow or torch"
    else:
        wanted = 2 * np.arange(64.0).reshape(4, 4, 4)
        wanted[2:] = 0
        assert np.allclose(said["maps"], wanted)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [installed("jax", "jax"), installed("torch", "bench")])
def test_the_whole_course_runs_on_another_backend(backend, tmp_path):
    asked = [word for name, value in TINY.items() for word in ("-p", name, value)]
    python(backend, "-m", "lungct", "run", "--run-dir", tmp_path / "run", *asked, timeout=1200)
    _, facts = training.load_model(tmp_path / "run" / "05_train_3d_cnn")
    assert facts["backend"] == backend and facts["packages"][backend] != "absent"


@pytest.mark.slow
@pytest.mark.parametrize("backend", [installed("torch", "bench")])
def test_features_are_freed_after_the_step_and_not_when_the_collector_comes_by(backend):
    assert child(backend, FREED) is True


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", installed("jax", "jax")])
def test_two_devices_share_a_batch_and_end_where_one_does(backend, tmp_path):
    start = LOGICAL if backend == "tensorflow" else ""
    said = child(backend, start + SHARED, tmp_path, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert said["devices"] == [1, 2] and said["made"] == [3]
    assert np.allclose(*said["losses"], rtol=1e-4)
    assert said["apart"] < 1e-3, "two steps of Adam, each of 0.01 at most"
    assert "batch_size 3 cannot be shared evenly by 2 devices" in said["refused"]


@pytest.mark.slow
def test_an_overflow_on_one_device_is_nobodys_step():
    (scale, *moved), *skipped, (last, *on) = child("tensorflow", LOGICAL + OVERFLOW)
    assert np.isfinite([scale, *moved, last, *on]).all()
    assert skipped == [[scale / 2, *moved], [scale / 4, *moved]]
    assert last == scale / 4 and on != moved


def test_more_devices_than_there_are_is_the_users_to_mend():
    with pytest.raises(training.runs.InputError, match=r"devices is 64, but tensorflow sees \d+ here \(.*give fewer"), \
            training.on_devices(64):
        pass


def test_no_device_to_share_with_changes_nothing():
    with training.on_devices(1):
        assert training._sharing() == 1
