"""What MLflow's UI shows of the runs at first: the columns of its table and its charts.

MLflow keeps a shared view as a tag of the experiment, and opens it by the name in the address.
"""

import json

NAME = "lab"
TAG = f"mlflow.sharedViewState.{NAME}"
VIEW = f"workflowType=machine_learning&viewStateShareKey={NAME}"  # in the address of the runs
# The columns of the table in their order, and their widths in pixels. "Created" says how the run ended, too.
COLUMNS = {
    "attributes.`Run Name`": 260,
    "metrics.`last`": 75,
    "metrics.`sd`": 75,
    "metrics.`best`": 75,
    "metrics.`validation`": 90,
    "metrics.`num_params`": 105,
    "params.`seed`": 65,
    "tags.`overrides`": 160,
    "tags.`targets`": 95,
    "runDateAndNestInfo": 140,
    "duration": 85,
    "attributes.`Models`": 200,
}
CURVES, OTHERS = "Learning curves", "Model metrics"  # the sections of the charts; the second is MLflow's own
# The metrics whose curves come first. The axes of accuracies begin here: the first epochs would flatten the others.
CHARTS = ["test_accuracy", "validation_accuracy", "train_accuracy", "test_loss", "train_loss", "lr"]
LEAST = {"test_accuracy": 98, "validation_accuracy": 98, "train_accuracy": 95}


def state() -> str:
    charts = [
        {
            "uuid": metric,
            "type": "LINE",
            "metricKey": metric,
            "metricSectionId": CURVES,
            "runsCountToCompare": 10,
            "xAxisKey": "step",
            "scaleType": "log" if metric.endswith("loss") else "linear",
            "lineSmoothness": 0,
            "yAxisKey": "metric",
            "range": {"yMin": LEAST[metric], "yMax": 100} if metric in LEAST else {},
        }
        for metric in CHARTS
    ]
    kept = {"isReordered": True, "deleted": False}
    sections = [{"uuid": name, "name": name, "display": name == CURVES, **kept} for name in (CURVES, OTHERS)]
    shown = {
        "orderByKey": "tags.`order`",
        "orderByAsc": True,
        "selectedColumns": [*COLUMNS],
        "columnOrder": [*COLUMNS],
        "columnWidths": COLUMNS,
        "compareRunCharts": charts,
        "compareRunSections": sections,
        "isAccordionReordered": True,
        "hideEmptyCharts": True,
    }
    return json.dumps(shown)
