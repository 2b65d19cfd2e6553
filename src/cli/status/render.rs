//! How a report is shown to people.

use std::fmt::Write as _;

use super::judge::{About, Cluster, Finding, Policy, Report, Weight};
use crate::cli::output::{Paint, Table};

/// The tables, and below them how it is in one line. `namespaces`: whether objects of several may be among them.
pub fn table(report: &Report, namespaces: bool, paint: &Paint) -> String {
    let mut text = String::new();
    if !report.clusters.is_empty() {
        let mut table = headed(&["CACHECLUSTER", "PHASE", "PRIMARY", "IN STEP", "SENTINELS", "VERSION"], namespaces, paint);
        for Cluster { about, phase, primary, in_step, sentinels, version } in &report.clusters {
            push(&mut table, about, [phase, primary, in_step, sentinels, version], namespaces, paint);
        }
        text.push_str(&table.render(paint));
        text.push('\n');
    }
    if !report.policies.is_empty() {
        let headings = ["CACHEPOLICY", "CLUSTER", "MODE", "WORKLOADS", "SIDECARS", "HITS", "LOADS SAVED", "JOURNAL", "CHANGES"];
        let mut table = headed(&headings, namespaces, paint);
        for policy in &report.policies {
            let Policy { about, cluster, mode, workloads, sidecars, hit_ratio, origin_load_saved, journal, changes } = policy;
            let cells = [cluster, mode, workloads, sidecars, hit_ratio, origin_load_saved, journal, changes];
            push(&mut table, about, cells, namespaces, paint);
        }
        text.push_str(&table.render(paint));
        text.push('\n');
    }
    text.push_str(&summary(report, paint));
    text
}

fn headed(headings: &[&str], namespaces: bool, paint: &Paint) -> Table {
    let namespace = if namespaces { Some("NAMESPACE") } else { None };
    // The first column marks what is not well, also where there are no colours.
    let headings: Vec<&str> = [" "].into_iter().chain(namespace).chain(headings.iter().copied()).collect();
    Table::new(&headings, paint)
}

fn push<const N: usize>(table: &mut Table, about: &About, cells: [&String; N], namespaces: bool, paint: &Paint) {
    let (mark, colour) = match about.findings.first().map(|finding| finding.weight) {
        Some(Weight::Wrong) => ("!", paint.bad),
        Some(Weight::Note) => ("~", paint.busy),
        None => (" ", ""),
    };
    let namespace = namespaces.then(|| about.namespace.clone());
    let start = [mark.to_owned()].into_iter().chain(namespace).chain([about.name.clone()]);
    let cells = start.chain(cells.into_iter().cloned()).collect();
    table.push(cells, colour, about.findings.iter().map(told).collect());
}

fn told(finding: &Finding) -> String {
    let Finding { weight: _, condition, reason, message } = finding;
    let what = [condition, reason].into_iter().filter(|word| !word.is_empty()).cloned().collect::<Vec<_>>().join(" ");
    format!("     {what}: {message}")
}

fn summary(report: &Report, paint: &Paint) -> String {
    let Report { well, clusters, policies } = report;
    let of = |one: &str, many: &str, abouts: &mut dyn Iterator<Item = &About>| {
        let (mut all, mut wrong) = (0, 0);
        for about in abouts {
            all += 1;
            wrong += usize::from(!about.well);
        }
        let what = if all == 1 { one } else { many };
        if *well { format!("{all} {what}") } else { format!("{wrong} of {all} {what}") }
    };
    let counts = [
        of("CacheCluster", "CacheClusters", &mut clusters.iter().map(|cluster| &cluster.about)),
        of("CachePolicy", "CachePolicies", &mut policies.iter().map(|policy| &policy.about)),
    ]
    .join(", ");
    let mut text = String::new();
    // Writing to a text cannot fail.
    let _ = match (well, clusters.len() + policies.len()) {
        (_, 0) => writeln!(text, "nothing is there: no CacheCluster and no CachePolicy"),
        (true, _) => writeln!(text, "{}all is well:{} {counts}", paint.good, paint.plain),
        (false, _) => writeln!(text, "{}not well:{} {counts}", paint.bad, paint.plain),
    };
    text
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn objects() -> ([Value; 2], [Value; 1]) {
        let healthy = json!([{"type": "Ready", "status": "True", "reason": "Serving", "message": "m"}]);
        let broken =
            json!([{"type": "Ready", "status": "False", "reason": "NoPrimary", "message": "nobody serves: see\nits pods"}]);
        let cluster = |name: &str, summary: &str, conditions: Value| {
            json!({
                "metadata": {"namespace": "shop", "name": name}, "spec": {"engine": {"kind": "Redis", "version": "7.0"}},
                "status": {"conditions": conditions, "summary": summary},
            })
        };
        let policy = json!({
            "metadata": {"namespace": "shop", "name": "catalog"}, "spec": {"cacheCluster": "main"},
            "status": {"conditions": healthy, "sidecars": {"current": 2, "total": 2}, "hitRatio": 0.5,
                "changes": [{"origin": "db", "reading": true, "lagSeconds": 0}]},
        });
        ([cluster("main", "Ready", healthy.clone()), cluster("old", "Not serving", broken)], [policy])
    }

    #[test]
    fn what_is_not_well_stands_first_with_its_reason() {
        let (clusters, policies) = objects();
        let shown = table(&Report::of(&clusters, &policies), false, &Paint::NONE);
        let expected = "\
\x20  CACHECLUSTER  PHASE        PRIMARY  IN STEP  SENTINELS  VERSION
!  old           Not serving  -        -        -          Redis 7.0
     Ready=False NoPrimary: nobody serves: see its pods
   main          Ready        -        -        -          Redis 7.0

   CACHEPOLICY  CLUSTER  MODE     WORKLOADS  SIDECARS  HITS    LOADS SAVED  JOURNAL  CHANGES
   catalog      main     Enforce  -          2/2       50.0 %  -            -        in time

not well: 1 of 2 CacheClusters, 0 of 1 CachePolicy
";
        assert_eq!(shown, expected, "{shown}");
    }

    #[test]
    fn all_namespaces_have_a_column_and_all_well_one_line() {
        let (clusters, policies) = objects();
        let shown = table(&Report::of(&clusters[..1], &policies), true, &Paint::NONE);
        assert!(shown.starts_with("   NAMESPACE  CACHECLUSTER") && shown.contains("\n   shop       main "), "{shown}");
        assert!(shown.ends_with("all is well: 1 CacheCluster, 1 CachePolicy\n"), "{shown}");
        let coloured = table(&Report::of(&clusters, &[]), false, &Paint::COLOURS);
        assert!(coloured.contains("\x1b[1;31m!  old") && coloured.contains("\x1b[1;31mnot well:\x1b[0m"), "{coloured}");
        let nothing = table(&Report::of(&[], &[]), false, &Paint::NONE);
        assert_eq!(nothing, "nothing is there: no CacheCluster and no CachePolicy\n");
    }
}
