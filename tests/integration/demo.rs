//! `larder demo` in small: a made-up data set and short phases, so that no speed is asserted, only what must hold at any speed.

use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::support::wait_for;

#[test]
fn the_demo_finds_no_wrong_reply_and_no_stampede() {
    let report = tempfile::tempdir().unwrap();
    let mut demo = Command::new(env!("CARGO_BIN_EXE_larder"))
        .args(["demo", "--seconds", "4", "--rows", "30000", "--rate", "300", "--clients", "24", "--report"])
        .arg(report.path())
        .spawn()
        .unwrap();
    // The exit code tells whether the machine was fast enough as well, which is not the question here.
    wait_for("the demo ends", Duration::from_secs(180), || demo.try_wait().unwrap().is_some());
    let json = std::fs::read(report.path().join("demo.json")).expect("the demo writes its report");
    let json: Value = serde_json::from_slice(&json).unwrap();
    let phases = json["phases"].as_array().unwrap();
    assert_eq!(phases.iter().map(|phase| phase["phase"].as_str().unwrap()).collect::<Vec<_>>(), ["none", "aside", "larder"]);
    for phase in phases {
        assert_eq!(phase["wrong"], 0, "{phase}");
        assert_eq!(phase["errors"], 0, "{phase}");
        assert_eq!(phase["closed_loop"]["errors"], 0, "{phase}");
        assert!(phase["answered"].as_u64().unwrap() > 0, "{phase}");
        assert!(phase["requests"] == phases[0]["requests"], "{phase}");
    }
    let [none, _, larder] = phases.as_slice() else { panic!("three phases") };
    assert_eq!(none["hit_ratio"], 0.0);
    assert_eq!(larder["peak_identical"], 1, "{larder}");
    assert_eq!(larder["closed_loop"]["peak_identical"], 1, "{larder}");
    // It loaded at all, and less often than it was asked.
    assert!(larder["board_loads"].as_u64().unwrap() >= 2, "{larder}");
    assert!(larder["origin_queries"].as_u64() < larder["answered"].as_u64(), "{larder}");
    for file in ["demo.svg", "demo.txt", "origin-queries.csv"] {
        assert!(report.path().join(file).metadata().unwrap().len() > 200, "{file}");
    }
}
