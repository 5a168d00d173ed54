//! The faults of an origin: nothing hangs, no wrong byte completes, and the client gets an answer that lets it fall
//! through.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hawker_conformance::lab::{Answer, End, Hawker};
use hawker_conformance::origin::{Blob, Fault, Rule};
use hawker_conformance::scene::{
    Plan, REPOSITORY, Scene, blob_path, committed_path, right, until_committed, withheld,
};

/// Some pieces, and a tail.
const SIZE_BYTES: u64 = (4 << 20) + 12_345;
/// containerd waits for headers for ever in old versions; others give up after 30 s.
const HEADERS: Duration = Duration::from_secs(30);

/// Plays on a seed and one node, with one fault at the origin.
fn with_fault(
    rule: impl FnOnce(&Blob) -> Rule,
    play: impl FnOnce(&Scene, &Blob) -> Result<()>,
) -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let blob = scene.blob(SIZE_BYTES)?;
        scene.origin.add_fault(rule(&blob));
        play(scene, &blob)
    })
}

/// A fault that is overcome: the blob comes out right, and once more from the cache when the origin is healthy or not.
fn overcome(rule: impl FnOnce(&Blob) -> Rule) -> Result<()> {
    with_fault(rule, |scene, blob| {
        scene.pull(scene.node(), blob)?;
        until_committed(scene.node(), blob)?;
        scene.pull(scene.node(), blob).map(drop)
    })
}

/// A fault under which the blob cannot come out: the answer says so in time, and once the fault is over all is well.
fn refused(
    rule: impl FnOnce(&Blob) -> Rule,
    look: impl FnOnce(&Answer) -> Result<()>,
) -> Result<()> {
    with_fault(rule, |scene, blob| {
        let start = Instant::now();
        let answer = withheld(scene.get(scene.node(), blob)?)?;
        ensure!(
            start.elapsed() < HEADERS + Duration::from_secs(5),
            "it took {:?}",
            start.elapsed()
        );
        look(&answer)?;
        ensure!(
            !committed_path(scene.node(), blob).exists(),
            "committed what it refused"
        );
        scene.origin.clear_faults();
        recovers(scene, scene.node(), blob)
    })
}

/// After a fault the node may hold back from the origin for a while, but not for long.
fn recovers(scene: &Scene, node: &Hawker, blob: &Blob) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        let answer = scene.get(node, blob)?;
        let complete = answer.status < 400 && answer.end == End::Complete;
        if complete || Instant::now() > deadline {
            return right(answer, blob).map(drop);
        }
        withheld(answer)?;
        std::thread::sleep(Duration::from_millis(250));
    }
}

fn status_is(codes: &'static [u16]) -> impl Fn(&Answer) -> Result<()> {
    move |answer| {
        ensure!(
            codes.contains(&answer.status),
            "{} is not one of {codes:?}: {}",
            answer.status,
            answer.text()
        );
        Ok(())
    }
}

fn status(code: u16) -> Rule {
    Rule::always(Fault::Status {
        code,
        retry_after_s: None,
    })
}

#[test]
fn an_origin_that_is_down_is_a_fast_error() -> Result<()> {
    with_fault(
        |_| Rule::always(Fault::Refuse),
        |scene, blob| {
            let start = Instant::now();
            let answer = withheld(scene.get(scene.node(), blob)?)?;
            ensure!(answer.status >= 500, "{}", answer.status);
            ensure!(
                start.elapsed() < Duration::from_secs(12),
                "it took {:?}",
                start.elapsed()
            );
            scene.origin.clear_faults();
            recovers(scene, scene.node(), blob)
        },
    )
}

#[test]
fn an_origin_that_is_down_does_not_matter_for_what_is_cached() -> Result<()> {
    Plan::nodes(2).play(|scene| {
        let blob = scene.blob(SIZE_BYTES)?;
        scene.pull(scene.node(), &blob)?;
        until_committed(scene.node(), &blob)?;
        scene.origin.add_fault(Rule::always(Fault::Refuse));
        // Access was confirmed a moment ago.
        scene.pull(scene.node(), &blob).map(drop)
    })
}

#[test]
fn an_origin_that_never_answers_is_an_error_within_30_s() -> Result<()> {
    refused(
        |_| Rule::always(Fault::Hang),
        |answer| {
            ensure!(
                answer.status >= 500 && answer.first_byte < HEADERS,
                "{} {:?}",
                answer.status,
                answer.first_byte
            );
            Ok(())
        },
    )
}

#[test]
fn late_headers_are_waited_for() -> Result<()> {
    overcome(|blob| Rule::always(Fault::SlowHeaders { delay_ms: 1500 }).on(blob.digest))
}

#[test]
fn a_slow_body_is_streamed_while_it_trickles() -> Result<()> {
    with_fault(
        |blob| {
            Rule::always(Fault::SlowBody {
                bytes_per_s: 1 << 20,
            })
            .on(blob.digest)
        },
        |scene, blob| {
            let answer = scene.pull(scene.node(), blob)?;
            ensure!(
                answer.first_byte < Duration::from_secs(2),
                "headers after {:?}",
                answer.first_byte
            );
            ensure!(
                answer.total < Duration::from_secs(10),
                "done after {:?}",
                answer.total
            );
            Ok(())
        },
    )
}

#[test]
fn a_reset_in_mid_body_is_overcome() -> Result<()> {
    overcome(|blob| {
        Rule::always(Fault::ResetAfter { bytes: 1_500_000 })
            .on(blob.digest)
            .method("GET")
            .times(2)
    })
}

#[test]
fn a_reset_in_place_of_headers_is_overcome() -> Result<()> {
    overcome(|blob| {
        Rule::always(Fault::ResetAfter { bytes: 0 })
            .on(blob.digest)
            .times(2)
    })
}

#[test]
fn a_truncated_body_is_overcome() -> Result<()> {
    overcome(|blob| {
        Rule::always(Fault::TruncateAfter { bytes: 1_500_000 })
            .on(blob.digest)
            .method("GET")
            .times(2)
    })
}

#[test]
fn an_origin_that_always_truncates_at_the_same_byte_never_completes_wrong_bytes() -> Result<()> {
    with_fault(
        |blob| {
            Rule::always(Fault::TruncateAfter { bytes: 1_000_000 })
                .on(blob.digest)
                .method("GET")
        },
        |scene, blob| {
            // Each attempt goes on where the last one ended, so this may well come out right.
            let answer = scene.get(scene.node(), blob)?;
            if answer.end == End::Complete && answer.status == 200 {
                right(answer, blob)?;
            } else {
                withheld(answer)?;
            }
            scene.origin.clear_faults();
            recovers(scene, scene.node(), blob)
        },
    )
}

#[test]
fn a_truncation_at_an_origin_that_ignores_ranges_is_overcome() -> Result<()> {
    with_fault(
        |blob| Rule::always(Fault::IgnoreRange).on(blob.digest),
        |scene, blob| {
            scene.origin.add_fault(
                Rule::always(Fault::TruncateAfter { bytes: 1_500_000 })
                    .on(blob.digest)
                    .method("GET")
                    .times(1),
            );
            scene.pull(scene.node(), blob).map(drop)
        },
    )
}

#[test]
fn a_transfer_that_breaks_off_is_completed_whatever_the_origin_makes_of_ranges() -> Result<()> {
    for fault in [
        Fault::ClosedRangeOnly,
        Fault::RefuseRange,
        Fault::EarlierRange { bytes: 1000 },
        Fault::ShortRange { bytes: 1000 },
    ] {
        with_fault(
            |blob| Rule::always(fault.clone()).on(blob.digest),
            |scene, blob| {
                let broken = Fault::TruncateAfter {
                    bytes: SIZE_BYTES / 2,
                };
                scene
                    .origin
                    .add_fault(Rule::always(broken).on(blob.digest).method("GET").times(1));
                scene
                    .pull(scene.node(), blob)
                    .with_context(|| format!("{fault:?}"))?;
                until_committed(scene.node(), blob)
            },
        )?;
    }
    Ok(())
}

#[test]
fn a_range_is_the_right_range_whatever_the_origin_makes_of_ranges() -> Result<()> {
    for fault in [
        Fault::IgnoreRange,
        Fault::RefuseRange,
        Fault::EarlierRange { bytes: 70 },
        Fault::ShortRange { bytes: 30 },
    ] {
        with_fault(
            |blob| Rule::always(fault.clone()).on(blob.digest),
            |scene, blob| {
                let request = || scene.node().request(scene.registry(), &blob_path(blob));
                let answer = request()
                    .header("range", "bytes=100-199")
                    .send(scene.node().host())?;
                let content_range = format!("bytes 100-199/{SIZE_BYTES}");
                ensure!(
                    answer.status == 206,
                    "{fault:?}: {}: {}",
                    answer.status,
                    answer.text()
                );
                ensure!(
                    answer.header("content-range") == Some(content_range.as_str()),
                    "{:?}",
                    answer.headers
                );
                let whole = request().send(scene.node().host())?;
                ensure!(answer.body == whole.body[100..200], "{fault:?}");
                Ok(())
            },
        )?;
    }
    Ok(())
}

#[test]
fn a_length_told_too_long_never_completes_wrong_bytes() -> Result<()> {
    refused(
        |blob| Rule::always(Fault::LieLength { off_by_bytes: 1000 }).on(blob.digest),
        |_| Ok(()),
    )
}

#[test]
fn a_length_told_too_short_never_completes_wrong_bytes() -> Result<()> {
    refused(
        |blob| {
            Rule::always(Fault::LieLength {
                off_by_bytes: -1000,
            })
            .on(blob.digest)
        },
        |_| Ok(()),
    )
}

#[test]
fn a_length_that_no_blob_has_costs_no_memory() -> Result<()> {
    with_fault(
        |blob| {
            Rule::always(Fault::LieLength {
                off_by_bytes: i64::MAX - (8 << 20),
            })
            .on(blob.digest)
        },
        |scene, blob| {
            withheld(
                scene
                    .request(scene.node(), blob)
                    .within(Duration::from_secs(20))
                    .send(scene.node().host())?,
            )?;
            scene.pull(scene.node(), &scene.blob(SIZE_BYTES)?)?;
            ensure!(scene.node().pid().is_some() && scene.node().status()?.ready);
            Ok(())
        },
    )
}

#[test]
fn blobs_that_trickle_do_not_keep_memory_from_the_others() -> Result<()> {
    Plan::nodes(1).flag("--memory", "16MiB").play(|scene| {
        // Their first pieces alone take all the memory of seed and node.
        let slow: Vec<Blob> = (0..80)
            .map(|_| scene.blob(300_000))
            .collect::<Result<_>>()?;
        for blob in &slow {
            scene
                .origin
                .add_fault(Rule::always(Fault::SlowBody { bytes_per_s: 1000 }).on(blob.digest));
        }
        let scene = &*scene;
        std::thread::scope(|scope| {
            for blob in &slow {
                // A client that leaves soon has a download that goes on for a while.
                let request = scene
                    .request(scene.node(), blob)
                    .within(Duration::from_secs(2));
                scope.spawn(move || request.send(scene.node().host()));
            }
        });
        let start = Instant::now();
        scene.pull(scene.node(), &scene.blob(SIZE_BYTES)?)?;
        ensure!(
            start.elapsed() < Duration::from_secs(25),
            "it took {:?}",
            start.elapsed()
        );
        Ok(())
    })
}

#[test]
fn wrong_bytes_in_the_middle_end_short_and_are_never_cached() -> Result<()> {
    refused(
        |blob| {
            Rule::always(Fault::WrongBytes {
                offset: 2 << 20,
                length: 3,
            })
            .on(blob.digest)
        },
        |_| Ok(()),
    )
}

#[test]
fn a_wrong_last_byte_ends_short_and_is_never_cached() -> Result<()> {
    refused(
        |blob| {
            Rule::always(Fault::WrongBytes {
                offset: SIZE_BYTES - 1,
                length: 1,
            })
            .on(blob.digest)
        },
        |answer| {
            ensure!(
                answer.status >= 400 || answer.body_bytes < SIZE_BYTES,
                "all bytes went out"
            );
            Ok(())
        },
    )
}

#[test]
fn bytes_that_were_wrong_once_are_read_again() -> Result<()> {
    with_fault(
        |blob| {
            Rule::always(Fault::WrongBytes {
                offset: 1 << 20,
                length: 1,
            })
            .on(blob.digest)
            .method("GET")
            .times(1)
        },
        |scene, blob| {
            // Sent bytes cannot be taken back, so the first answer may be short; it is not wrong.
            let answer = scene.get(scene.node(), blob)?;
            if answer.end == End::Complete && answer.status == 200 {
                right(answer, blob)?;
            } else {
                withheld(answer)?;
            }
            recovers(scene, scene.node(), blob)
        },
    )
}

#[test]
fn a_challenge_passes_through_with_its_realm() -> Result<()> {
    let basic = Fault::Basic {
        user: "robot".into(),
        password: "secret".into(),
    };
    refused(
        |_| Rule::always(basic),
        |answer| {
            ensure!(answer.status == 401, "{}", answer.status);
            let challenge = answer.header("www-authenticate").unwrap_or_default();
            ensure!(
                challenge.to_ascii_lowercase().starts_with("basic"),
                "{challenge:?}"
            );
            Ok(())
        },
    )
}

#[test]
fn what_a_password_got_is_cached_and_given_to_nobody_without_it() -> Result<()> {
    let basic = || Fault::Basic {
        user: "robot".into(),
        password: "secret".into(),
    };
    with_fault(
        |_| Rule::always(basic()),
        |scene, blob| {
            let with = |credentials: &str| {
                let request = scene
                    .request(scene.node(), blob)
                    .header("authorization", credentials);
                request.send(scene.node().host())
            };
            // robot:secret and robot:wrong
            for _ in 0..2 {
                right(with("Basic cm9ib3Q6c2VjcmV0")?, blob)?;
                ensure!(with("Basic cm9ib3Q6d3Jvbmc=")?.status == 401);
                ensure!(
                    scene.get(scene.node(), blob)?.status == 401,
                    "it was cached for everybody"
                );
                until_committed(scene.node(), blob)?;
            }
            ensure!(
                !committed_path(&scene.cluster.seed, blob).exists(),
                "a password was lent to the seed"
            );
            for member in [&scene.cluster.seed, scene.node()] {
                let log = member.log();
                ensure!(
                    !log.contains("cm9ib3Q6") && !log.contains("secret"),
                    "credentials are in a log"
                );
            }
            Ok(())
        },
    )
}

#[test]
fn forbidden_passes_through() -> Result<()> {
    refused(|_| status(403), status_is(&[403]))
}

#[test]
fn not_found_passes_through_as_blob_unknown() -> Result<()> {
    refused(
        |_| status(404),
        |answer| {
            ensure!(
                answer.status == 404 && answer.text().contains("BLOB_UNKNOWN"),
                "{}: {}",
                answer.status,
                answer.text()
            );
            Ok(())
        },
    )
}

#[test]
fn too_many_requests_passes_through_with_retry_after_and_is_not_multiplied() -> Result<()> {
    with_fault(
        |_| {
            Rule::always(Fault::Status {
                code: 429,
                retry_after_s: Some(2),
            })
        },
        |scene, blob| {
            for _ in 0..6 {
                // As containerd does: six at once, without a pause.
                let answer = withheld(scene.get(scene.node(), blob)?)?;
                ensure!(answer.status >= 429, "{}", answer.status);
                ensure!(
                    answer.status != 429 || answer.header("retry-after").is_some(),
                    "{:?}",
                    answer.headers
                );
            }
            let asked = scene.origin.totals().requests;
            ensure!(asked <= 12, "six requests became {asked}");
            scene.origin.clear_faults();
            recovers(scene, scene.node(), blob)
        },
    )
}

#[test]
fn server_errors_are_server_errors() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        for code in [500, 502, 503] {
            let blob = scene.blob(SIZE_BYTES)?;
            scene.origin.add_fault(status(code).on(blob.digest));
            let answer = withheld(scene.get(scene.node(), &blob)?)?;
            ensure!(answer.status >= 500, "{code} became {}", answer.status);
            scene.origin.clear_faults();
            recovers(scene, scene.node(), &blob)?;
        }
        Ok(())
    })
}

#[test]
fn server_errors_that_pass_are_overcome() -> Result<()> {
    overcome(|blob| status(503).on(blob.digest).method("GET").times(1))
}

#[test]
fn a_chunked_body_of_unknown_length_comes_out_right() -> Result<()> {
    unknown_length(true)
}

#[test]
fn a_body_of_unknown_length_that_ends_with_the_connection_comes_out_right() -> Result<()> {
    unknown_length(false)
}

fn unknown_length(chunked: bool) -> Result<()> {
    with_fault(
        |blob| Rule::always(Fault::NoLength { chunked }).on(blob.digest),
        |scene, blob| {
            let request = scene.request(scene.node(), blob);
            right(request.clone().send(scene.node().host())?, blob)?;
            right(request.send(scene.node().host())?, blob).map(drop)
        },
    )
}

#[test]
fn a_redirect_is_followed_and_an_expired_one_resolved_again() -> Result<()> {
    with_fault(
        |blob| {
            Rule::always(Fault::Redirect {
                status: 307,
                base: String::new(),
                expired: 1,
            })
            .on(blob.digest)
        },
        |scene, blob| scene.pull(scene.node(), blob).map(drop),
    )
}

#[test]
fn without_a_seed_the_faults_are_overcome_as_well() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        scene.cluster.seed.kill()?;
        let blob = scene.blob(SIZE_BYTES)?;
        for fault in [
            Fault::ResetAfter { bytes: 600_000 },
            Fault::TruncateAfter { bytes: 900_000 },
        ] {
            scene
                .origin
                .add_fault(Rule::always(fault).on(blob.digest).method("GET").times(1));
        }
        let start = Instant::now();
        scene.pull(scene.node(), &blob)?;
        ensure!(
            start.elapsed() < Duration::from_secs(25),
            "it took {:?}",
            start.elapsed()
        );
        Ok(())
    })
}

#[test]
fn manifests_of_a_failing_origin_are_errors_too() -> Result<()> {
    Plan::nodes(1).play(|scene| {
        let node = scene.node();
        let manifest = || {
            node.request(
                scene.registry(),
                &format!("/v2/{REPOSITORY}/manifests/none"),
            )
            .send(node.host())
        };
        let answer = manifest()?;
        ensure!(
            answer.status == 404 && answer.text().contains("MANIFEST_UNKNOWN"),
            "{}",
            answer.text()
        );
        for (rule, least) in [
            (status(500), 500),
            (status(403), 403),
            (Rule::always(Fault::Refuse), 500),
        ] {
            scene.origin.add_fault(rule);
            let answer = manifest()?;
            ensure!(
                answer.status >= least && answer.end == End::Complete,
                "{}",
                answer.status
            );
            scene.origin.clear_faults();
        }
        Ok(())
    })
}
