//! What a refusal by the kernel's verifier comes to: its log has a line for each instruction that it followed.

/// The verifier says at the end what it minds, and below that how much it has looked at.
const STATISTICS: [&str; 3] = ["verification time ", "stack depth ", "processed "];

/// A complaint and the bound that it follows from.
const LINES: usize = 2;

/// The last words of a verifier's log, on one line.
pub fn complaint(log: &str) -> String {
    let is_said = |line: &&str| !line.is_empty() && !STATISTICS.iter().any(|begin| line.starts_with(begin));
    let mut last: Vec<_> = log.lines().rev().map(str::trim).filter(is_said).take(LINES).collect();
    last.reverse();
    if last.is_empty() { "the verifier says nothing".to_owned() } else { last.join("; ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_words_before_the_statistics_are_taken() {
        let log = "918: (07) r3 += 156                   ; frame1: R3_w=map_value(off=156,ks=4,vs=432,imm=0) cb\n\
                   920: (85) call bpf_skb_load_bytes#26\n\
                   invalid access to map value, value_size=432 off=156 size=0\n\
                   R3 min value is outside of the allowed memory range\n\
                   verification time 97236 usec\n\
                   stack depth 48+0+0+0+0\n\
                   processed 5318 insns (limit 1000000) max_states_per_insn 4 total_states 267 peak_states 246 mark_read 27\n\n";
        assert_eq!(
            complaint(log),
            "invalid access to map value, value_size=432 off=156 size=0; R3 min value is outside of the allowed memory range"
        );
    }

    #[test]
    fn a_short_log_and_none_are_said_too() {
        assert_eq!(complaint("unknown func bpf_loop#181\n"), "unknown func bpf_loop#181");
        assert_eq!(complaint(""), "the verifier says nothing");
    }
}
