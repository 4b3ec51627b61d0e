"""A run's log is whole, in order and without repetition, however often the run is killed."""

import json
import os
import time

import pytest
import torch
from conftest import awake
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.model import BaseModel, revert_sync_batchnorm
from mmengine.runner import Runner
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from dn_mmdet import DNB
from dn_mmdet.checkpoint import safe_loading
from dn_mmdet.experiments.controls import BNSE, StaticDN
from dn_mmdet.experiments.recording import (
    PARENT,
    Diverged,
    Orphaned,
    RecordRun,
    describe,
    norm_counts,
    nothing_to_fold,
    read_log,
    scale_and_shift,
)

STEPS = 3  # in an epoch
EPOCHS = 3


class Toy(BaseModel):
    def __init__(self, norm=nn.BatchNorm2d, nan_at=None):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), norm(4)
        self.nan_at, self.step = nan_at, 0

    def forward(self, inputs, data_samples=None, mode='tensor'):
        inputs = torch.stack(list(inputs)) if isinstance(inputs, list) else inputs
        out = self.norm(self.conv(inputs))
        if mode == 'loss':
            self.step += 1
            return dict(
                loss=out.square().mean() * (float('nan') if self.step == self.nan_at else 1)
            )
        return list(out)


class Metric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += [1.0] * len(data_samples)

    def compute_metrics(self, results):
        return dict(count=sum(results))


def runner(folder, model=None, resume=False, hooks=(), epochs=EPOCHS):
    torch.manual_seed(0)
    data = [dict(inputs=torch.randn(3, 4, 4), data_samples=i) for i in range(2 * STEPS)]
    loader = dict(
        batch_size=2,
        dataset=data,
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=pseudo_collate,
    )
    return Runner(
        model or Toy(),
        str(folder),
        train_dataloader=loader,
        val_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        val_cfg=dict(),
        val_evaluator=Evaluator(Metric()),
        custom_hooks=[dict(type='RecordRun'), *hooks],
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        resume=resume,
        experiment_name=f'toy{time.time_ns()}',
    )


class KilledAt:
    """Stands for a kill at one of the hook points."""

    def __init__(self, point, epoch):
        self.point, self.epoch = point, epoch

    def __call__(self, run):
        if run.epoch == self.epoch:
            raise KeyboardInterrupt


def killing(point, epoch):
    from mmengine.hooks import Hook

    return type(
        'Kill', (Hook,), {point: lambda self, run, *args, **kwargs: KilledAt(point, epoch)(run)}
    )()


def steps(folder, key):
    return [line['step'] for line in read_log(folder) if key in line]


def test_a_run_leaves_its_losses_metrics_environment_and_measurements(tmp_path):
    runner(tmp_path).train()
    assert steps(tmp_path, 'loss') == list(range(1, STEPS * EPOCHS + 1))
    assert steps(tmp_path, 'metrics') == [STEPS * epoch for epoch in range(1, EPOCHS + 1)]
    lines = read_log(tmp_path)
    assert lines[-1]['metrics'] == dict(count=2 * STEPS)
    assert lines[0]['lr'] == 0.1 and lines[0]['steps'] == STEPS * EPOCHS
    assert all(line['seconds'] > 0 for line in lines)
    environment = json.loads((tmp_path / 'environment.json').read_text())
    assert environment['versions']['torch'] == torch.__version__
    assert environment['data']['train']['samples'] == 2 * STEPS
    measured = json.loads((tmp_path / 'measured.json').read_text())
    assert measured['norms'] == dict(BN=1)
    assert measured['parameters'] == 3 * 4 + 4 + 2 * 4
    assert measured['mult_adds']['convolutions'] == 3 * 4 * 16
    assert measured['peak_memory']['megabytes'] > 1


@pytest.mark.parametrize(
    'point', ['after_train_iter', 'before_val_epoch', 'after_val_iter', 'after_train']
)
def test_after_a_kill_every_step_and_every_validation_is_there_once(point, tmp_path):
    epoch = EPOCHS if point == 'after_train' else 1
    run = runner(tmp_path, hooks=[killing(point, epoch)])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    whole = (tmp_path / 'measured.json').is_file()
    assert not whole
    with safe_loading():  # upstream mmengine cannot open its own checkpoints
        runner(tmp_path, resume=True).train()
    assert steps(tmp_path, 'loss') == list(range(1, STEPS * EPOCHS + 1))
    assert steps(tmp_path, 'metrics') == [STEPS * epoch for epoch in range(1, EPOCHS + 1)]
    assert (tmp_path / 'measured.json').is_file()


def test_training_accuracy_is_logged_beside_the_loss_where_the_model_gives_it(tmp_path):
    model = Toy()
    forward, given = model.forward, iter(range(100))

    def with_accuracy(inputs, data_samples=None, mode='tensor'):
        out = forward(inputs, data_samples, mode)
        if mode == 'loss':
            out['accuracy_top-1'] = torch.tensor(float(next(given)))
        return out

    model.forward = with_accuracy
    runner(tmp_path, model, epochs=1).train()
    lines = [line for line in read_log(tmp_path) if 'loss' in line]
    assert [line['accuracy_top-1'] for line in lines] == [0, 1, 2]


def test_a_model_whose_cost_cannot_be_counted_loses_nothing_else(tmp_path):
    model = Toy()
    forward = model.forward
    model.val_step = lambda data: [None] * len(data['inputs'])

    def no_plain_outputs(inputs, data_samples=None, mode='tensor'):
        if mode == 'tensor':
            raise NotImplementedError('only losses')
        return forward(inputs, data_samples, mode)

    model.forward = no_plain_outputs
    runner(tmp_path, model, epochs=1).train()
    measured = json.loads((tmp_path / 'measured.json').read_text())
    assert measured['mult_adds'] is None
    assert measured['mult_adds_not_measured'] == 'NotImplementedError: only losses'
    assert measured['parameters'] == 24


def test_a_line_that_a_kill_cut_off_is_no_line(tmp_path):
    runner(tmp_path, epochs=1).train()
    whole = read_log(tmp_path)
    with open(tmp_path / 'log.jsonl', 'a') as log:
        log.write('{"step": 4, "lo')
    assert read_log(tmp_path) == whole


def test_a_loss_that_is_no_number_ends_the_run_and_is_in_the_log(tmp_path):
    with pytest.raises(Diverged, match='became nan in step 2 of 9'):
        runner(tmp_path, Toy(nan_at=2)).train()
    assert 'nan in step 2' in read_log(tmp_path)[-1]['diverged']
    assert not (tmp_path / 'measured.json').exists()


def test_a_run_does_not_outlive_the_process_that_started_it(tmp_path, monkeypatch):
    monkeypatch.setenv(PARENT, str(os.getppid()))
    runner(tmp_path / 'a', epochs=1).train()
    monkeypatch.setenv(PARENT, str(os.getpid()))  # which is not this process's parent
    with pytest.raises(Orphaned, match='has ended'):
        runner(tmp_path / 'b').train()
    assert read_log(tmp_path / 'b') == []


def test_norms_are_counted_by_type_and_inner_ones_are_not():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), DNB(8), nn.BatchNorm2d(8), nn.GroupNorm(2, 8), DNB(8), BNSE(8)
    )
    assert norm_counts(model) == dict(BN=1, BNSE=1, DNB=2, GN=1)


def test_plain_norms_of_every_kind_leave_nothing_to_fold():
    plain = [
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4),
        nn.BatchNorm3d(4),
        FrozenBatchNorm2d(4),
        revert_sync_batchnorm(nn.SyncBatchNorm(4)),
    ]
    for norm in plain:
        counts = norm_counts(nn.Sequential(norm))
        assert sum(counts.values()) == 1 and nothing_to_fold(counts), counts
    for norm in (DNB(8), StaticDN(8)):
        assert not nothing_to_fold(norm_counts(nn.Sequential(norm, *plain)))


def test_the_scale_of_a_dn_layer_spreads_over_samples_and_that_of_bn_does_not(close):
    model = awake(nn.Sequential(DNB(4), nn.BatchNorm2d(4)))
    model.val_step = lambda x: model(x)
    nn.init.normal_(model[1].weight)
    x = torch.randn(6, 4, 5, 5)
    model.train()
    dnb, bn = scale_and_shift(model, [x[:4], x[4:]])
    assert model.training
    assert (dnb['layer'], bn['layer']) == ('0', '1')
    with torch.no_grad():
        model.eval()
        g, h = model[0].sc(x.mean((2, 3)), (x.var((2, 3), correction=0) + 1e-5).sqrt())
    gamma = model[0].weight.detach() * (1 + g)
    close(torch.tensor(dnb['gamma'][2]), gamma.flatten().quantile(0.5))
    close(torch.tensor(dnb['beta'][4]), h.flatten().quantile(0.95))
    close(torch.tensor(dnb['gamma_over_samples']), gamma.std(0, correction=0).mean())
    close(torch.tensor(bn['gamma'][2]), model[1].weight.detach().quantile(0.5))
    assert bn['gamma_over_samples'] == 0


def test_the_fingerprint_depends_on_labels_and_names_and_not_on_the_folder(tmp_path):
    from mmengine.dataset import BaseDataset, RepeatDataset

    class Images(BaseDataset):
        METAINFO = dict(classes=('a', 'b'))

        def __init__(self, root, label=0):
            self.root, self.label = root, label
            super().__init__()

        def load_data_list(self):
            return [
                dict(img_path=f'{self.root}/1.png', gt_label=0),
                dict(
                    img_path=f'{self.root}/2.png',
                    gt_label=self.label,
                    instances=[dict(bbox=[0, 0, 1, 1], bbox_label=1)],
                ),
            ]

    first = describe(Images('here'))
    assert first['samples'] == 2
    assert describe(Images('there')) == first
    assert describe(Images('here', label=1))['fingerprint'] != first['fingerprint']
    assert describe(RepeatDataset(Images('here'), times=5)) == dict(first, times=5)
    assert describe([1, 2, 3])['fingerprint'] is None
    assert RecordRun.priority == 'LOWEST'
