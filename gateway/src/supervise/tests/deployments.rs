//! Functions that have several instances, change, are bounded, or come and go.
use crate::config::Bytes;

use super::*;

#[tokio::test]
async fn each_instance_has_its_own_socket_and_its_own_name_in_the_log() {
    let text = "echo socket $(readlink /proc/$$/fd/3); exec sleep 1000";
    let mut running = Running::start_function(script("echo", text), 2).await;
    let said = running.said.after_each(["echo@1 | socket ", "echo@2 | socket "]).await;
    assert_eq!(running.listed(), ["echo@1.sock", "echo@2.sock"]);
    let inodes = ["echo@1.sock", "echo@2.sock"].map(|name| inode_of(&running.sockets().join(name)));
    assert_eq!(said, inodes.map(|inode| format!("socket:[{inode}]")));
    running.stop().await;
    running.ended().await;
}

#[tokio::test]
async fn the_number_of_instances_changes_without_a_new_start_of_the_others() {
    let program = || script("echo", "echo pid $$; exec sleep 1000");
    let mut running = Running::start_function(program(), 1).await;
    let first = pid(&running.said.after("echo | pid ").await);
    running.change(Some((program(), 3))).await;
    let more = running.said.after_each(["echo@1 | pid ", "echo@2 | pid "]).await.map(|said| pid(&said));
    assert_eq!(running.listed(), ["echo.sock", "echo@1.sock", "echo@2.sock"]);
    let ends = more.map(watch_end);
    running.change(Some((program(), 1))).await;
    until_ended(&ends).await;
    running.until_listed(&["echo.sock"]).await;
    assert!(test_kill_process(first).is_ok());
    running.stop().await;
    running.ended().await;
}

#[tokio::test]
async fn a_changed_function_takes_over_when_it_is_up() {
    let mut running = Running::start_function(script("echo", "echo old $$; exec sleep 1000"), 1).await;
    let old = watch_end(pid(&running.said.after("echo | old ").await));
    running.change(Some((script("echo", "echo new $$; exec sleep 1000"), 2))).await;
    let new = running.said.after_each(["echo@1 | new ", "echo@2 | new "]).await.map(|said| pid(&said));
    let_one_in(new[0]).await;
    assert_eq!(running.listed(), ["echo.sock", "echo@1.sock", "echo@2.sock"], "one of two is up");
    let_one_in(new[1]).await;
    until_ended(&[old]).await;
    running.until_listed(&["echo@1.sock", "echo@2.sock"]).await;
    assert!(new.iter().all(|pid| test_kill_process(*pid).is_ok()));

    // The same once more changes nothing; none at all lets it go.
    running.change(Some((script("echo", "echo new $$; exec sleep 1000"), 2))).await;
    let ends = new.map(watch_end);
    running.change(None).await;
    until_ended(&ends).await;
    running.until_listed(&[]).await;
    running.change(Some((script("echo", "echo again $$; exec sleep 1000"), 1))).await;
    pid(&running.said.after("echo | again ").await);
    running.stop().await;
    running.ended().await;
}

#[tokio::test]
async fn a_changed_function_that_can_not_run_leaves_the_old_one() {
    let mut running = Running::start_function(script("echo", "echo old $$; exec sleep 1000"), 1).await;
    let old = pid(&running.said.after("echo | old ").await);
    running.change(Some((script("echo", "echo broken; exit 1"), 1))).await;
    running.said.after("echo@1 | broken").await;
    running.until_listed(&["echo.sock"]).await;
    let mut missing = script("echo", "");
    missing.executable = PathBuf::from("/nowhere/echo");
    running.change(Some((missing, 1))).await;
    running.change(Some((script("echo", "echo new $$; exec sleep 1000"), 1))).await;
    let new = pid(&running.said.after("echo@1 | new ").await);
    assert!(test_kill_process(old).is_ok());
    let old = watch_end(old);
    let_one_in(new).await;
    until_ended(&[old]).await;
    running.stop().await;
    running.ended().await;
}

#[tokio::test]
async fn who_fails_too_often_is_given_up_until_the_next_reload() {
    let failing = |text: &str| {
        let mut program = script("echo", text);
        program.restart_limit = Some(2);
        program
    };
    let mut running = Running::start_function(failing("echo begins; exit 1"), 1).await;
    for _ in 0..3 {
        running.said.after("echo | begins").await;
    }
    running.until_listed(&[]).await;
    running.change(Some((failing("echo begins; exit 1"), 1))).await;
    running.said.after("echo | begins").await;
    running.stop().await;
    running.ended().await;
}

#[tokio::test]
async fn who_needs_more_memory_than_it_may_is_killed_and_runs_again() {
    let mut greedy = script(
        "echo",
        "echo begins; hoard=$(head -c 200000000 /dev/zero | tr '\\0' x); echo has it; exec sleep 1000",
    );
    greedy.memory_max = Some(Bytes(32 << 20));
    let mut running = Running::start_function(greedy, 1).await;
    for _ in 0..2 {
        assert_eq!(running.said.after("echo | ").await, "begins");
    }
    running.stop().await;
    running.stop().await;
    running.ended().await;

    let mut modest = script(
        "echo",
        "echo begins; hoard=$(head -c 2000000 /dev/zero | tr '\\0' x); echo has it; exec sleep 1000",
    );
    modest.memory_max = Some(Bytes(64 << 20));
    let mut running = Running::start_function(modest, 1).await;
    running.said.after("echo | has it").await;
    running.stop().await;
    running.ended().await;
}
