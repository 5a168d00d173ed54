use std::time::Duration;

use super::*;

fn scenario(hosts: u32) -> Scenario {
    Scenario {
        hosts,
        size_bytes: 32 << 20,
        rate: 12.5e6,
        ..Scenario::default()
    }
}

#[test]
fn everybody_gets_everything_soon_and_the_origin_gives_it_once() {
    let outcome = run(&scenario(30));
    assert_eq!(outcome.checks.found(), [] as [&str; 0]);
    assert_eq!(outcome.origin_copies, 1.0);
    // A blob of 128 pieces for 30 nodes: until each has one to give, and the last one has gone round, is half as long as the bound.
    assert!(outcome.quantile(1.0) < 1.6, "{}", outcome.quantile(1.0));
}

#[test]
fn the_same_seed_is_the_same_run_and_another_is_not() {
    // So many that several threads decide for them, where there are any.
    let trace = |rng, threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            run(&Scenario {
                rng,
                ..scenario(40)
            })
            .trace
        })
    };
    assert_eq!(trace(1, 1), trace(1, 3));
    assert_ne!(trace(1, 3), trace(2, 3));
}

#[test]
fn the_dying_and_the_lying_harm_nobody_else() {
    let faults = Faults {
        die: 0.1,
        lie: 0.05,
        noticed_after: Duration::from_millis(200),
        ..Faults::default()
    };
    let outcome = run(&Scenario {
        faults,
        ..scenario(40)
    });
    assert_eq!(outcome.checks.found(), [] as [&str; 0]);
    assert!(outcome.wrong_pieces > 0);
    assert_eq!(
        outcome.finishes.iter().filter(|finish| finish.dead).count(),
        4
    );
    assert!(outcome.origin_copies < 1.1, "{}", outcome.origin_copies);
}

#[test]
fn without_seeds_the_scheduler_elects_and_after_its_restart_nobody_goes_back_to_the_origin() {
    let restart = vec![Duration::from_millis(1200)];
    let faults = Faults {
        scheduler_restarts: restart,
        scheduler_away: Duration::from_millis(500),
        ..Faults::default()
    };
    let outcome = run(&Scenario {
        faults,
        ..scenario(20)
    });
    assert_eq!(outcome.checks.found(), [] as [&str; 0]);
    assert_eq!(outcome.origin_copies, 1.0);
}

#[test]
fn too_many_copies_from_the_origin_are_a_violation() {
    let outcome = run(&Scenario {
        origin_copies_max: 0.5,
        ..scenario(3)
    });
    assert_eq!(outcome.checks.count(), 1);
}

#[test]
fn a_fetch_that_does_not_end_in_time_is_a_violation() {
    let outcome = run(&Scenario {
        ends_after: Some(Duration::from_millis(500)),
        ..scenario(3)
    });
    assert_eq!(outcome.checks.count(), 3, "{:?}", outcome.checks.found());
}

#[test]
fn each_piece_comes_into_each_zone_once() {
    let outcome = run(&Scenario {
        zones: 3,
        ..scenario(36)
    });
    assert_eq!(outcome.checks.found(), [] as [&str; 0]);
    assert!(outcome.zone_copies <= 1.02, "{}", outcome.zone_copies);
}

#[test]
fn whoever_brings_a_task_into_a_zone_is_replaced_when_it_dies_whether_there_is_a_scheduler_or_not()
{
    for scheduler_restarts in [vec![], vec![Duration::from_millis(400)]] {
        let faults = Faults {
            die: 0.3,
            noticed_after: Duration::from_millis(200),
            scheduler_restarts,
            scheduler_away: Duration::from_secs(100),
            ..Faults::default()
        };
        let outcome = run(&Scenario {
            zones: 3,
            faults,
            ..scenario(36)
        });
        assert_eq!(outcome.checks.found(), [] as [&str; 0]);
        assert_eq!(outcome.origin_copies, 1.0);
    }
}
