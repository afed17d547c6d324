//! The supervisor with real processes: shell scripts that say what they were given.
use std::{
    fs,
    io::{self, Write},
    mem,
    os::{
        fd::OwnedFd,
        unix::fs::{PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    thread,
};

use handoff::FunctionsDirectory;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{FdFlags, fcntl_setfd},
    net::accept,
    process::{
        Pid, PidfdFlags, PidfdGetfdFlags, Signal, WaitOptions, geteuid, kill_process, pidfd_getfd,
        pidfd_open, test_kill_process, waitpid,
    },
};
use tempfile::TempDir;
use tokio::{
    task::JoinHandle,
    time::{sleep, timeout},
};

use super::{child::Child, *};
use crate::{
    logs::Logs,
    reload::{Source, SourceOptions},
};

mod deployments;

/// What is waited for comes at once, or the test has failed.
const DEADLINE: Duration = Duration::from_secs(10);

/// Waits for its end, and says nothing about SIGTERM.
const SLEEP: &str = "exec sleep 1000";

struct Running {
    folder: TempDir,
    said: Said,
    stop: mpsc::Sender<()>,
    change: mpsc::Sender<Vec<Wanted>>,
    ended: JoinHandle<()>,
}

impl Running {
    async fn start(programs: Vec<Program>) -> Self {
        Self::start_wanted(programs.into_iter().map(|program| wanted_once(program, 1)).collect()).await
    }

    /// Refusal, and one function that may have several instances.
    async fn start_function(program: Program, instances: u16) -> Self {
        Self::start_wanted(vec![wanted_once(script("refusal", SLEEP), 1), wanted_once(program, instances)])
            .await
    }

    async fn start_wanted(wanted: Vec<Wanted>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (logs, said) = logs();
        let directory = Directory::open(&folder.path().join("functions")).unwrap();
        let supervisor = Supervisor::start(directory, wanted, &logs.log()).unwrap();
        let (stop, requests) = mpsc::channel(1);
        let (change, changes) = mpsc::channel(1);
        let ended = tokio::spawn(supervisor.run(requests, changes));
        Self { folder, said, stop, change, ended }
    }

    async fn change(&self, function: Option<(Program, u16)>) {
        let refusal = wanted_once(script("refusal", SLEEP), 1);
        let function = function.map(|(program, instances)| wanted_once(program, instances));
        self.change.send([refusal].into_iter().chain(function).collect()).await.unwrap();
    }

    /// The function's sockets, refusal's not included.
    fn listed(&self) -> Vec<String> {
        let entries = fs::read_dir(self.sockets()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name != "refusal.sock");
        names.sort();
        names
    }

    async fn until_listed(&self, names: &[&str]) {
        let listed = async {
            while self.listed() != names {
                sleep(Duration::from_millis(5)).await;
            }
        };
        let done = timeout(DEADLINE, listed).await;
        assert!(done.is_ok(), "{:?} instead of {names:?}", self.listed());
    }

    fn sockets(&self) -> PathBuf {
        self.folder.path().join("functions")
    }

    async fn stop(&self) {
        self.stop.send(()).await.unwrap();
    }

    async fn ended(&mut self) {
        timeout(DEADLINE, &mut self.ended).await.expect("the supervisor goes on").unwrap();
        assert!(!self.sockets().exists(), "the directory was left behind");
    }
}

/// The lines that the functions wrote.
struct Said(mpsc::UnboundedReceiver<String>);

impl Said {
    /// The next line that begins so, without its beginning.
    async fn after(&mut self, start: &str) -> String {
        let [rest] = self.after_each([start]).await;
        rest
    }

    /// The same for several, which come in any order.
    async fn after_each<const N: usize>(&mut self, starts: [&str; N]) -> [String; N] {
        let mut found = [const { None }; N];
        let all = async {
            while found.iter().any(Option::is_none) {
                let line = self.0.recv().await.expect("the log has ended");
                let missing = starts.iter().zip(&mut found).filter(|(_, found)| found.is_none());
                for (start, found) in missing {
                    *found = line.strip_prefix(start).map(str::to_owned);
                }
            }
        };
        timeout(DEADLINE, all)
            .await
            .unwrap_or_else(|_| panic!("lines are missing that begin with {starts:?}"));
        found.map(Option::unwrap)
    }
}

fn pid(said: &str) -> Pid {
    Pid::from_raw(said.parse().unwrap()).unwrap()
}

fn logs() -> (Logs, Said) {
    struct Lines(mpsc::UnboundedSender<String>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            for line in String::from_utf8(bytes.to_vec()).unwrap().lines() {
                // Nobody reads any more: the test has seen what it waited for.
                // Lines begin with the time.
                let line = line.split_once(' ').map_or(line, |(_, line)| line);
                let _ = self.0.send(line.to_owned());
            }
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    let (sender, lines) = mpsc::unbounded_channel();
    (Logs::to(Lines(sender), crate::logs::Format::Text).unwrap(), Said(lines))
}

/// A shell script, as the user that a function is run as.
fn script(name: &str, text: &str) -> Program {
    let mut program = Program::bare(name.parse().unwrap(), PathBuf::from("/bin/sh"));
    program.arguments = vec!["-c".to_owned(), text.to_owned()];
    program.environment = vec![("PATH".to_owned(), "/usr/bin:/bin".to_owned())];
    program.user = Users::default().of_function(name.parse().unwrap(), None, geteuid()).unwrap();
    program
}

fn wanted_once(program: Program, instances: u16) -> Wanted {
    Wanted { program: Arc::new(program), instances }
}

/// Lets the first one in who connects to the process's socket and closes at once: as good as a greeting.
async fn let_one_in(pid: Pid) {
    let socket = pidfd_getfd(watch_end(pid), 3, PidfdGetfdFlags::empty()).unwrap();
    let accepting = tokio::task::spawn_blocking(move || drop(accept(&socket).unwrap()));
    timeout(DEADLINE, accepting).await.expect("nobody connects").unwrap();
}

fn watch_end(pid: Pid) -> OwnedFd {
    pidfd_open(pid, PidfdFlags::empty()).unwrap()
}

#[track_caller]
fn assert_ends(end: &OwnedFd) {
    let deadline = Timespec { tv_sec: DEADLINE.as_secs() as i64, tv_nsec: 0 };
    let ended = poll(&mut [PollFd::new(end, PollFlags::IN)], Some(&deadline)).unwrap();
    assert_eq!(ended, 1, "the process lives on");
}

/// The same while the supervisor is at work.
async fn until_ended(ends: &[OwnedFd]) {
    let ends: Vec<_> = ends.iter().map(|end| end.try_clone().unwrap()).collect();
    tokio::task::spawn_blocking(move || ends.iter().for_each(assert_ends)).await.unwrap();
}

/// The inode of the listening socket at a path.
fn inode_of(path: &Path) -> String {
    let sockets = fs::read_to_string("/proc/net/unix").unwrap();
    // Connections that wait to be accepted have the same path.
    let listens = |line: &&str| line.split_whitespace().nth(3) == Some("00010000");
    let line = sockets.lines().filter(listens).find(|line| line.ends_with(path.to_str().unwrap())).unwrap();
    line.split_whitespace().nth(6).unwrap().to_owned()
}

#[tokio::test]
async fn a_function_gets_its_socket_and_its_files_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let mut echo = script(
        "echo",
        r#"ls -m /proc/$$/fd
        echo socket $(readlink /proc/$$/fd/3)
        echo certificate $(cat <&4)
        echo key $(cat <&5)
        echo tickets $(readlink /proc/$$/fd/6)
        echo input $(readlink /proc/$$/fd/0)
        echo passed $LISTEN_FDS $LISTEN_FDNAMES ${LISTEN_PID-unset}
        echo group $(($(cut -d' ' -f5 /proc/$$/stat) - $$))
        echo place $(pwd)
        echo variables $(env | cut -d= -f1 | sort)
        exec sleep 1000"#,
    );
    for name in ["certificate", "key"] {
        let path = folder.path().join(name);
        fs::write(&path, format!("the {name}")).unwrap();
        // The function's user could not open it.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        echo.files.push((name, path));
    }
    // As if the supervisor's parent had left it open.
    let inherited = fs::File::open("/dev/null").unwrap();
    fcntl_setfd(&inherited, FdFlags::empty()).unwrap();
    echo.environment.push(("LISTEN_PID".to_owned(), "1".to_owned()));
    let mut running = Running::start(vec![script("refusal", SLEEP), echo]).await;
    let said = &mut running.said;
    assert_eq!(said.after("echo | ").await, "0, 1, 2, 3, 4, 5, 6");
    let socket = said.after("echo | socket ").await;
    assert_eq!(said.after("echo | certificate ").await, "the certificate");
    assert_eq!(said.after("echo | key ").await, "the key");
    assert_eq!(said.after("echo | tickets ").await, "/memfd:pointsman-tickets (deleted)");
    assert_eq!(said.after("echo | input ").await, "/dev/null");
    assert_eq!(said.after("echo | passed ").await, "4 pool:certificate:key:tickets unset");
    assert_eq!(said.after("echo | group ").await, "0");
    assert_eq!(said.after("echo | place ").await, "/");
    // PWD and _ are the shell's own.
    let variables = said.after("echo | variables ").await;
    let passed: Vec<_> = variables.split(' ').filter(|name| !["PWD", "_"].contains(name)).collect();
    assert_eq!(passed, ["LISTEN_FDNAMES", "LISTEN_FDS", "PATH"]);
    assert_eq!(socket, format!("socket:[{}]", inode_of(&running.sockets().join("echo.sock"))));
    running.stop().await;
    running.ended().await;
}

#[tokio::test]
async fn a_function_without_a_certificate_gets_its_socket_alone() {
    let hello = script("hello", "ls -m /proc/$$/fd; echo $LISTEN_FDS $LISTEN_FDNAMES; exec sleep 1000");
    let mut running = Running::start(vec![script("refusal", SLEEP), hello]).await;
    assert_eq!(running.said.after("hello | ").await, "0, 1, 2, 3");
    assert_eq!(running.said.after("hello | ").await, "1 pool");
    running.stop().await;
    running.ended().await;
}

#[tokio::test]
async fn a_function_has_no_privilege_even_where_its_user_can_not_reach_its_program() {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
    let program = folder.path().join("program");
    symlink("/bin/sh", &program).unwrap();
    let mut echo = script("echo", "echo comm $(cat /proc/$$/comm); exec cat /proc/self/status");
    echo.executable = program;
    let user = echo.user.clone();
    let mut running = Running::start(vec![script("refusal", SLEEP), echo]).await;
    assert_eq!(running.said.after("echo | comm ").await, "program");
    let (uid, gid) = match &user {
        Some(user) => (user.uid.as_raw(), user.gid.as_raw()),
        None => (geteuid().as_raw(), rustix::process::getegid().as_raw()),
    };
    assert_eq!(running.said.after("echo | Uid:\t").await, [uid; 4].map(|uid| uid.to_string()).join("\t"));
    assert_eq!(running.said.after("echo | Gid:\t").await, [gid; 4].map(|gid| gid.to_string()).join("\t"));
    if let Some(user) = user {
        let groups = user.groups.iter().map(|group| group.as_raw().to_string()).collect::<Vec<_>>().join(" ");
        assert_eq!(running.said.after("echo | Groups:\t").await.trim_end(), groups);
    }
    for set in ["SigBlk", "CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(running.said.after(&format!("echo | {set}:\t")).await, "0000000000000000", "{set}");
    }
    assert_eq!(running.said.after("echo | NoNewPrivs:\t").await, "1");
    running.stop().await;
    running.ended().await;
}

#[tokio::test]
async fn a_killed_function_runs_again_and_keeps_its_pool_connections() {
    let folder = tempfile::tempdir().unwrap();
    let certificate = folder.path().join("certificate");
    fs::write(&certificate, "old").unwrap();
    let mut echo = script(
        "echo",
        r#"echo $(cat <&4); echo socket $(readlink /proc/$$/fd/3); echo pid $$; exec sleep 1000"#,
    );
    echo.files.push(("certificate", certificate.clone()));
    let mut running = Running::start(vec![script("refusal", SLEEP), echo]).await;
    running.said.after("echo | old").await;
    let socket = running.said.after("echo | socket ").await;
    let first = pid(&running.said.after("echo | pid ").await);
    let pool = FunctionsDirectory::open(&running.sockets()).unwrap().connect("echo.sock").unwrap();

    fs::write(&certificate, "renewed").unwrap();
    kill_process(first, Signal::KILL).unwrap();
    running.said.after("echo | renewed").await;
    assert_eq!(running.said.after("echo | socket ").await, socket);
    let second = pid(&running.said.after("echo | pid ").await);
    assert_ne!(first, second);
    let cut = poll(&mut [PollFd::new(&pool, PollFlags::empty())], Some(&Timespec::default())).unwrap();
    assert_eq!(cut, 0, "the pool connection was cut");

    // Again, after the wait that a second failure brings.
    kill_process(second, Signal::KILL).unwrap();
    pid(&running.said.after("echo | pid ").await);
    running.stop().await;
    running.ended().await;
}

#[tokio::test]
async fn a_function_has_keys_for_tickets_that_outlive_its_instances_and_are_nobody_elses() {
    let folder = tempfile::tempdir().unwrap();
    let certificate = folder.path().join("certificate");
    fs::write(&certificate, "").unwrap();
    let with_keys = |name: &str| {
        let mut program = script(name, "echo keys $(stat -L -c %i /proc/$$/fd/5) $$; exec sleep 1000");
        program.files.push(("certificate", certificate.clone()));
        program
    };
    let programs = [script("refusal", SLEEP), with_keys("echo"), with_keys("other")];
    let mut wanted: Vec<_> = programs.map(|program| wanted_once(program, 1)).into();
    wanted[1].instances = 2;
    let mut running = Running::start_wanted(wanted).await;
    let lines = ["echo@1 | keys ", "echo@2 | keys ", "other | keys "];
    let said = running.said.after_each(lines).await;
    let [(first, process), (second, _), (other, _)] =
        said.each_ref().map(|said| said.split_once(' ').unwrap());
    assert_eq!(first, second);
    assert_ne!(first, other);
    kill_process(pid(process), Signal::KILL).unwrap();
    let again = running.said.after("echo@1 | keys ").await;
    assert_eq!(again.split_once(' ').unwrap().0, first);

    let mut changed = with_keys("echo");
    changed.environment.push(("ROUND".to_owned(), "1".to_owned()));
    running.change(Some((changed, 1))).await;
    let redeployed = running.said.after("echo | keys ").await;
    assert_eq!(redeployed.split_once(' ').unwrap().0, first);
    running.stop().await;
    running.ended().await;
}

#[tokio::test]
async fn a_function_that_ends_itself_runs_again_and_its_last_words_are_carried() {
    let echo = script("echo", r#"echo begins $$; printf 'unfinished'; exit 3"#);
    let mut running = Running::start(vec![script("refusal", SLEEP), echo]).await;
    for _ in 0..2 {
        pid(&running.said.after("echo | begins ").await);
        assert_eq!(running.said.after("echo | unfin").await, "ished");
    }
    running.stop().await;
    running.ended().await;
}

#[tokio::test]
async fn a_function_that_never_stops_writing_keeps_nobody_waiting() {
    let stubborn = "trap '' TERM; exec yes";
    let mut running = Running::start(vec![script("refusal", SLEEP), script("echo", stubborn)]).await;
    running.said.after("echo | y").await;
    running.said.0.close();
    running.stop().await;
    running.stop().await;
    running.ended().await;
}

#[tokio::test]
async fn what_a_killed_function_had_started_goes_with_it() {
    let echo = script("echo", r#"sleep 1000 & echo helper $!; echo pid $$; wait"#);
    let mut running = Running::start(vec![script("refusal", SLEEP), echo]).await;
    let helper = watch_end(pid(&running.said.after("echo | helper ").await));
    kill_process(pid(&running.said.after("echo | pid ").await), Signal::KILL).unwrap();
    let next = watch_end(pid(&running.said.after("echo | helper ").await));
    assert_ends(&helper);
    running.stop().await;
    running.ended().await;
    assert_ends(&next);
}

#[tokio::test]
async fn refusal_answers_until_the_last_function_has_drained() {
    // Drains until it reads a line from the FIFO.
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let fifo = folder.path().join("drained");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o444)).unwrap();
    let drains = format!(
        "trap 'echo drains; read line < {}; echo $line; exit 0' TERM; echo runs; while :; do sleep 1000 & wait; done",
        fifo.display()
    );
    let refuses = "trap 'echo stops; exit 0' TERM; echo runs; while :; do sleep 1000 & wait; done";
    let mut running = Running::start(vec![script("refusal", refuses), script("echo", &drains)]).await;
    running.said.after_each(["refusal | runs", "echo | runs"]).await;
    running.stop().await;
    running.said.after("echo | drains").await;
    let sockets = || {
        let entries = fs::read_dir(running.sockets()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(sockets(), ["refusal.sock"], "the gateway must see at once who takes nothing new");
    let writing = fifo.clone();
    tokio::task::spawn_blocking(move || fs::write(writing, "drained\n").unwrap()).await.unwrap();
    running.said.after("echo | drained").await;
    running.said.after("refusal | stops").await;
    running.ended().await;
}

#[tokio::test]
async fn a_second_request_ends_at_once_what_does_not_want_to() {
    let stubborn = "trap '' TERM; echo pid $$; exec sleep 1000";
    let mut running = Running::start(vec![script("refusal", stubborn), script("echo", stubborn)]).await;
    let pids = running.said.after_each(["refusal | pid ", "echo | pid "]).await;
    let [refusal, echo] = pids.map(|said| watch_end(pid(&said)));
    running.stop().await;
    running.stop().await;
    running.ended().await;
    assert_ends(&refusal);
    assert_ends(&echo);
}

#[tokio::test]
async fn the_deadline_ends_what_does_not_want_to() {
    let folder = tempfile::tempdir().unwrap();
    let directory = Directory::open(folder.path()).unwrap();
    let (logs, mut said) = logs();
    let programs = [script("refusal", SLEEP), script("echo", "trap '' TERM; echo pid $$; exec sleep 1000")];
    let wanted = programs.map(|program| wanted_once(program, 1)).into();
    let mut supervisor = Supervisor::start(directory, wanted, &logs.log()).unwrap();
    let end = watch_end(pid(&said.after("echo | pid ").await));
    let (_open, mut requests) = mpsc::channel(1);
    let hurried = timeout(DEADLINE, supervisor.end(Group::Functions, Instant::now(), &mut requests)).await;
    assert_eq!(hurried, Ok(false));
    assert_ends(&end);
}

#[tokio::test]
async fn a_stop_does_not_wait_for_a_restart() {
    // Reads nothing and fails, which soon means seconds between its starts.
    let mut running =
        Running::start(vec![script("refusal", SLEEP), script("echo", "echo begins; exit 1")]).await;
    for _ in 0..4 {
        running.said.after("echo | begins").await;
    }
    running.stop().await;
    running.ended().await;
}

#[tokio::test]
async fn all_start_or_none_does() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("functions");
    let directory = Directory::open(&path).unwrap();
    // Passes every check but exec's own.
    let broken = folder.path().join("broken");
    fs::write(&broken, "#!/nowhere/interpreter\n").unwrap();
    fs::set_permissions(&broken, fs::Permissions::from_mode(0o755)).unwrap();
    let (logs, mut said) = logs();
    let log = logs.log();
    let mut echo = script("echo", "");
    echo.executable = broken.clone();
    let programs = [script("refusal", "echo pid $$; exec sleep 1000"), echo];
    let wanted = programs.map(|program| wanted_once(program, 1)).into();
    let failure = Supervisor::start(directory, wanted, &logs.log()).err().unwrap();
    let failure = format!("{failure:#}");
    let expected = format!("function echo can't be started: {}: No such file or directory", broken.display());
    assert!(failure.starts_with(&expected), "{failure}");
    assert!(!path.exists());
    // It may have been killed before it said anything.
    log.append(b"now test | end\n");
    let mut line = said.after("").await;
    if let Some(pid) = line.strip_prefix("refusal | pid ") {
        assert!(!Path::new("/proc").join(pid).exists(), "refusal runs on");
        line = said.after("").await;
    }
    assert_eq!(line, "test | end");
}

#[test]
fn functions_die_with_the_thread_that_started_them() {
    let (logs, _said) = logs();
    let log = logs.log();
    let starting = thread::spawn(move || {
        let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _context = runtime.enter();
        let folder = tempfile::tempdir().unwrap();
        let directory = Directory::open(folder.path()).unwrap();
        let listener = directory.listen_first("echo".parse().unwrap(), 1).unwrap().remove(0);
        let child = Child::spawn(&script("echo", SLEEP), "echo", listener.socket(), None, None, log).unwrap();
        let pid = child.pid();
        // As if the supervisor were killed: its end does nothing more.
        mem::forget(child);
        pid
    });
    let pid = starting.join().unwrap();
    assert_ends(&watch_end(pid));
    let (_, status) = waitpid(Some(pid), WaitOptions::empty()).unwrap().unwrap();
    assert_eq!(status.terminating_signal(), Some(Signal::KILL.as_raw()));
}

#[test]
fn what_the_configuration_has_no_command_for_is_left_to_others() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pointsman.toml");
    fs::write(&file, "[functions.own]\ncommand = [\"/bin/sh\"]\n[functions.others]\n").unwrap();
    let source = Source::new(SourceOptions { config: Some(file), watch: false }, |_| ());
    let config = source.read().unwrap();
    let names = |refusal: &str| {
        let options = Options { refusal: Some(refusal.into()) };
        let wanted = wanted(&config, &options).map_err(|error| format!("{error:#}"))?;
        Ok::<_, String>(wanted.iter().map(|wanted| wanted.program.name.to_string()).collect::<Vec<_>>())
    };
    assert_eq!(names("/bin/sh").unwrap(), ["refusal", "own"]);
    assert_eq!(
        names("/nowhere/refusal").unwrap_err(),
        "function refusal can't be started: its program /nowhere/refusal: No such file or directory (os error 2)"
    );
}
