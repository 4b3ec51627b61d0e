"""A finished run is evaluated with its DN layers folded, as fold_norm and the evaluator say."""

import json

import pytest
import torch
from conftest import awake
from test_convert import used
from tiny_detector import make_coco, write_config

from dn_mmdet.cli import command_line
from dn_mmdet.convert import dn_layers
from dn_mmdet.deploy import fold_run
from dn_mmdet.deploy import folding as deploy
from dn_mmdet.deploy.folded_config import built
from dn_mmdet.experiments import compare, results
from dn_mmdet.experiments.recording import PARENT, Orphaned
from dn_mmdet.fold import fold_norm, recalibrate


def finished(tmp_path, norm='DNB', std=0.1):
    """The folder of a run that has finished; its config."""
    make_coco(tmp_path, num_images=8)
    cfg = command_line.load_config(write_config(tmp_path, norm))
    folder = tmp_path / 'run'
    folder.mkdir()
    cfg.dump(folder / 'config.py')
    model = used(awake(built(cfg), std=std))
    torch.save(dict(state_dict=model.state_dict(), meta={}), folder / 'epoch_1.pth')
    run = dict(
        question='q', data='d', config='tiny', seed=0, epochs=1, lr=0.1, batch=2, commit='c'
    )
    metrics = deploy.Evaluation(cfg).metrics(model)
    result = dict(status='finished', metrics=metrics, norms={norm: 9}, seconds=1.0, run=run)
    for name, content in (('run.json', run), ('result.json', result)):
        (folder / name).write_text(json.dumps(content))
    return folder, cfg


def outputs(cfg, model):
    """What the evaluator sees of a model: its scores, to which AP is too coarse."""
    evaluation = deploy.Evaluation(cfg)
    with torch.no_grad():
        return torch.cat(
            [
                sample.pred_instances.scores
                for batch in evaluation.loader
                for sample in model.eval().val_step(batch)
            ]
        )


@pytest.fixture
def scores(monkeypatch):
    """In place of COCO's metrics, the scores of all boxes."""
    monkeypatch.setattr(
        deploy.Evaluation,
        'metrics',
        lambda self, model: dict(
            scores=[
                score
                for batch in self.loader
                for sample in model.eval().val_step(batch)
                for score in sample.pred_instances.scores.tolist()
            ]
        ),
    )


def test_the_metrics_are_those_of_fold_norm_over_the_runs_own_training_images(
    tmp_path, scores, close
):
    folder, cfg = finished(tmp_path)
    fold_run.main([str(folder)])
    found = compare.read_folded(folder)
    assert set(found) == set(results.FOLDED)
    state = torch.load(folder / 'epoch_1.pth')['state_dict']
    images = deploy.Calibration(cfg, 512, deploy.Evaluation(cfg).loader.collate_fn)
    assert len(images.chosen) == 8  # all that there are

    def folded(keep):
        model = built(cfg)
        model.load_state_dict(state)
        report = fold_norm(model, images.batches(images.chosen, images.evaluated), keep=keep)
        assert keep or all(row.folded for row in report)
        return model

    layers = len(dn_layers(built(cfg)))
    whole, most = folded(0), folded(layers - round(0.75 * layers))
    assert len(dn_layers(most)) == layers - round(0.75 * layers) > 0
    again = folded(0)
    recalibrate(again, images.batches(images.chosen, images.trained))
    for name, model in zip(results.FOLDED, (whole, most, again), strict=True):
        close(torch.tensor(found[name]['scores']), outputs(cfg, model))
    assert len({str(found[name]['scores']) for name in results.FOLDED}) == 3


def test_a_row_holds_the_folded_metrics(tmp_path, capsys):
    folder, _ = finished(tmp_path)
    assert not set(results.FOLDED) & set(results.read([folder])[0].row)  # an old row
    fold_run.main([str(folder)])
    row = results.read([folder])[0].row
    found = compare.read_folded(folder)
    assert [row[name] for name in results.FOLDED] == [
        found[name]['coco/bbox_mAP'] for name in results.FOLDED
    ]
    assert 'Average Precision' not in capsys.readouterr().out


def test_dnc_folds_exactly(tmp_path, scores, close):
    folder, cfg = finished(tmp_path, 'DNC')
    fold_run.main([str(folder)])
    found = compare.read_folded(folder)
    model = built(cfg)
    model.load_state_dict(torch.load(folder / 'epoch_1.pth')['state_dict'])
    for name in results.FOLDED:
        close(torch.tensor(found[name]['scores']), outputs(cfg, model))


def test_statistics_of_batches_that_are_too_small_are_left_out(tmp_path, monkeypatch):
    folder, _ = finished(tmp_path)
    monkeypatch.setattr(deploy.Folding, 'recalibrate', lambda *_: False)
    fold_run.main([str(folder)])
    row = results.read([folder])[0].row
    assert row['folded'] is not None and row['folded_recalibrated'] is None


def test_a_model_that_cannot_be_folded_is_a_result_with_its_reason(tmp_path):
    folder, _ = finished(tmp_path)
    checkpoint = torch.load(folder / 'epoch_1.pth')
    checkpoint['state_dict']['backbone.conv1.conv.weight'][0] = float('nan')
    torch.save(checkpoint, folder / 'epoch_1.pth')
    fold_run.main([str(folder)])
    assert 'backbone.conv1.bn are not finite' in compare.read_folded(folder)['not_folded']
    assert not compare.awaits_folding(folder)
    row = results.read([folder])[0].row
    assert row['folded'] is None and row['value'] is not None


def test_the_grid_starts_this_module():
    assert compare.FOLD == fold_run.__name__


def test_a_run_without_validation_has_no_folded_metric(tmp_path):
    folder, cfg = finished(tmp_path)
    for name in ('val_dataloader', 'val_evaluator', 'val_cfg'):
        cfg[name] = None
    cfg.dump(folder / 'config.py')
    fold_run.main([str(folder)])
    assert 'it lacks val_dataloader' in compare.read_folded(folder)['not_folded']


def test_a_run_that_has_not_finished_or_lost_its_checkpoint_is_refused(tmp_path, capsys):
    folder, _ = finished(tmp_path)
    (folder / 'epoch_1.pth').rename(tmp_path / 'epoch_1.pth')
    with pytest.raises(SystemExit):
        fold_run.main([str(folder)])
    assert 'its checkpoint is gone' in capsys.readouterr().err
    (folder / 'result.json').unlink()
    with pytest.raises(SystemExit):
        fold_run.main([str(folder)])
    assert 'expected a run that has finished' in capsys.readouterr().err
    assert compare.read_folded(folder) is None


def test_folding_ends_with_the_process_that_started_it(tmp_path, monkeypatch):
    folder, _ = finished(tmp_path)
    monkeypatch.setenv(PARENT, '1')
    with pytest.raises(Orphaned, match='has ended'):
        fold_run.main([str(folder)])
    assert compare.read_folded(folder) is None
